"""The base model from the hub, a folder or the repository, quantized where asked, with LoRA on it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base_model import load as base_model
from ..core.environment import installed_version
from ..core.files import BenchmarkError, sha256, sha256_of_file
from .config import ALL_LINEAR, FinetuneConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
_CHECKPOINTING = {"use_reentrant": False}
_INSTALL = "pip install -e '.[finetune]'"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the hub's id, a folder, or "embedded"."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path | None:
        """The model's folder; None for a model from the hub."""
        if self.model == EMBEDDED:
            return base_model.FOLDER
        return Path(self.model) if Path(self.model).is_dir() else None

    @property
    def name(self) -> str:
        """The hub's id, or the folder's own name: no path of this machine."""
        if self.is_embedded:
            return EMBEDDED
        return self.folder.resolve().name if self.folder else self.model

    @property
    def is_embedded(self) -> bool:
        """Whether it is the repository's own model, whose tokenizer transformers does not find."""
        return self.folder is not None and self.folder.resolve() == base_model.FOLDER

    def keywords(self) -> dict[str, Any]:
        """Keywords for `from_pretrained`. transformers itself finds the hub's token."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


def check_source(source: Source) -> None:
    """Refuse a folder that is not there before anything asks the hub for it."""
    looks_like_a_path = source.model.startswith((".", "/", "~")) or source.model.count("/") > 1
    if source.folder is None and looks_like_a_path:
        raise BenchmarkError(
            f"--model {source.model}: no such folder; give one that holds config.json, or a hub id"
        )


def _unavailable(source: Source, what: str, error: Exception) -> BenchmarkError:
    reason = " ".join(str(error).split())
    remedy = (
        f"the folder must hold what save_pretrained writes ({what})"
        if source.folder
        else "check the name, the network and, for a model that asks for consent, HF_TOKEN; a folder that "
        "holds the model may be given instead: --model FOLDER"
    )
    return BenchmarkError(f"cannot load the {what} of {source.model} ({reason}); {remedy}")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with something to pad with."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.is_embedded:
        return PreTrainedTokenizerFast(
            tokenizer_object=base_model.load_tokenizer(), pad_token=base_model.PAD, eos_token=base_model.EOS
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.model, **source.keywords())
    except (OSError, ValueError, ImportError) as error:
        raise _unavailable(source, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    return tokenizer


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
    from transformers import AutoModelForCausalLM

    low = config.quantize != "none" or config.precision == "bf16"
    keywords = {
        "dtype": torch.bfloat16 if low else torch.float32,
        **_quantization(config),
        **source.keywords(),
    }
    if source.is_embedded:
        keywords["attn_implementation"] = "eager"  # at its size the plain products are faster on a CPU
    try:
        return AutoModelForCausalLM.from_pretrained(source.folder or source.model, **keywords)
    except (OSError, ValueError, ImportError) as error:
        raise _unavailable(source, "model", error) from error


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


def positions(source: Source) -> int | None:
    """Tokens that the model reads at a time, where its configuration says so."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder or source.model, **source.keywords())
    except (OSError, ValueError) as error:
        raise _unavailable(source, "configuration", error) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def model_fingerprint(source: Source, model: Any) -> str:
    """The hub's commit, or a hash of the folder's weights and configuration."""
    if source.folder is None:
        return f"{source.model}@{getattr(model.config, '_commit_hash', None) or source.revision or 'main'}"
    files = sorted(
        [*source.folder.glob("*.safetensors"), *source.folder.glob("*.bin"), source.folder / "config.json"]
    )
    return sha256(part for file in files for part in (file.name, sha256_of_file(file)))
