"""The base model from the hub, a folder or the repository, quantized where asked, with LoRA on it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..base_model.source import Source, load_weights
from ..core.environment import installed_version
from ..core.files import BenchmarkError
from .config import ALL_LINEAR, FinetuneConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_CHECKPOINTING = {"use_reentrant": False}
_INSTALL = "pip install -e '.[finetune]'"


def _quantization(config: FinetuneConfig) -> dict[str, Any]:
    """NF4 with double quantization and bf16 compute, as in QLoRA."""
    if config.quantize == "none":
        return {}
    missing = [name for name in ("bitsandbytes", "accelerate") if installed_version(name) is None]
    if missing:
        raise BenchmarkError(f"--quantize {config.quantize} needs {' and '.join(missing)}: {_INSTALL}")
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": nf4, "device_map": {"": config.device}}


def _load_base(source: Source, config: FinetuneConfig) -> PreTrainedModel:
    low = config.quantize != "none" or config.precision == "bf16"
    return load_weights(source, dtype=torch.bfloat16 if low else torch.float32, **_quantization(config))


def _prepared(model: Any, config: FinetuneConfig) -> PreTrainedModel:
    """The frozen model on its device, ready for adapters."""
    from peft import prepare_model_for_kbit_training

    model.config.use_cache = False  # generation turns it on for itself
    if config.quantize != "none":
        _keep_trainable(model)
        return prepare_model_for_kbit_training(model, config.gradient_checkpointing, _CHECKPOINTING)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(_CHECKPOINTING)
    return model.to(config.device)


def _keep_trainable(model: Any) -> None:
    """Forbid bitsandbytes' fast path for inference on CPUs that have AVX512-BF16.

    Its first use, in evaluation, repacks a layer's weights for good, and the packed product passes no
    gradient on: training would go on with wrong gradients. Nor does it take layers whose width is no multiple
    of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_model(source: Source, config: FinetuneConfig) -> PeftModel:
    """The model with its adapter; at first this is drawn from the seed and changes nothing.

    Raises:
        BenchmarkError: The model cannot be had, or has no such layers.
    """
    from peft import LoraConfig, get_peft_model

    names, base = config.target_modules, _load_base(source, config)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names if names == ALL_LINEAR else names.split(","),
        use_rslora=config.rslora,
        bias="none",
        task_type="CAUSAL_LM",
        revision=source.revision,
    )
    torch.manual_seed(config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # between peft and transformers, nothing that is used here
        try:
            return get_peft_model(_prepared(base, config), lora)
        except ValueError as error:
            raise BenchmarkError(f"--target-modules {names}: {error}") from error
