"""Models of the shapes that people train, with random weights: a step costs the same with any weights.

Nothing is fetched. On an accelerator a model is built there at once, in bf16, so that host memory does not
matter.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.files import BenchmarkError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaConfig, PreTrainedModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTIZATIONS = ("none", "nf4")
SHAPE_LR = 1e-4  # the losses of random weights mean nothing: a rate so low that no optimizer diverges

# From the models' config.json on the hub; "tiny" is nobody's, and small enough for a test.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b-shape": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama-3-70b-shape": {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "llama-3.2-1b-shape": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What is trained and on how much: all that a step's cost depends on but optimizer and machine.

    Attributes:
        model: a name in :data:`SHAPES`.
        quantize: "nf4" keeps the frozen linear layers in 4 bits (bitsandbytes, double quantization), as QLoRA
            does.
        rank: LoRA's rank; alpha is the same.
        layers: decoder layers, None for as many as the model has.
        batch_size: sequences per forward pass.
        length: tokens per sequence.
        accumulation: forward and backward passes per step.
        checkpointing: whether activations are recomputed in the backward pass.
        device: "cpu", "cuda" or "meta".
    """

    model: str
    quantize: str = "none"
    rank: int = 16
    layers: int | None = None
    batch_size: int = 2
    length: int = 2048
    accumulation: int = 4
    checkpointing: bool = True
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.batch_size * self.length

    @property
    def mixed(self) -> bool:
        """Whether frozen weights are in bf16 and passes under autocast; on a CPU everything is in fp32."""
        return self.device != "cpu" or self.quantize != "none"

    def label(self) -> str:
        """Model and size of a step, for file names and tables."""
        parts = [self.model]
        parts += ["nf4"] if self.quantize == "nf4" else []
        parts += [f"{self.layers}layers"] if self.layers else []
        return "-".join([*parts, f"{self.accumulation}x{self.tokens}tokens"])


def check_model(name: str) -> str:
    """The name itself, or an error that lists the known ones."""
    if name not in SHAPES:
        raise BenchmarkError(f"unknown model {name!r}; known: embedded, {', '.join(SHAPES)}")
    return name


def model_config(workload: Workload) -> LlamaConfig:
    """The architecture of a workload's model."""
    from transformers import LlamaConfig

    shape = dict(SHAPES[check_model(workload.model)])
    if workload.layers is not None:
        shape["num_hidden_layers"] = workload.layers
    return LlamaConfig(
        **shape,
        max_position_embeddings=max(8192, workload.length),
        rms_norm_eps=1e-5,
        use_cache=False,
        pad_token_id=None,
    )


def autocast(workload: Workload) -> AbstractContextManager[Any]:
    """The precision of the forward pass: bf16 where the frozen weights are."""
    if workload.mixed and workload.device != "meta":
        return torch.autocast(workload.device.partition(":")[0], torch.bfloat16)
    return nullcontext()


def frozen_model(workload: Workload, attention: str = "sdpa") -> PreTrainedModel:
    """The model without adapters, on its device, in training mode."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if workload.mixed else torch.float32
    with torch.device(workload.device):
        model = AutoModelForCausalLM.from_config(
            model_config(workload), dtype=dtype, attn_implementation=attention
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if workload.quantize == "nf4":
        _quantize(model, workload)
    elif workload.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a new name for the same in transformers 5.2x
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def adapted_model(workload: Workload, attention: str = "sdpa", seed: int = 0) -> PeftModel:
    """The model with LoRA in fp32 on its seven projections."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = frozen_model(workload, attention)
    lora = LoraConfig(
        r=workload.rank, lora_alpha=workload.rank, target_modules=list(TARGETS), lora_dropout=0.0
    )
    with warnings.catch_warnings(), torch.device(workload.device):
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # between peft and transformers, nothing that is used here
        return get_peft_model(model, lora).train()


def _quantize(model: PreTrainedModel, workload: Workload) -> None:
    """Put the decoder's linear layers into NF4, one at a time, and prepare the model as QLoRA's users do."""
    from peft import prepare_model_for_kbit_training

    if workload.device == "meta":
        raise BenchmarkError(
            "NF4 has no kernels on the meta device; count without --quantize, NF4's share is computed"
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise BenchmarkError(
            f"--quantize nf4 needs bitsandbytes: {error}; pip install bitsandbytes"
        ) from error
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent = block.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _nf4(module, bitsandbytes.nn, workload.device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft goes by when it chooses its layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        prepare_model_for_kbit_training(
            model, workload.checkpointing, {"use_reentrant": False} if workload.checkpointing else None
        )


def _nf4(linear: torch.nn.Linear, layers: Any, device: str) -> torch.nn.Module:
    """The same layer with its weight in NF4, its scales quantized too."""
    kinds = {"compress_statistics": True, "quant_type": "nf4"}
    with torch.device("meta"):  # its own first weight is not wanted
        quantized = layers.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, **kinds
        )
    quantized.weight = layers.Params4bit(linear.weight.data, requires_grad=False, **kinds).to(device)
    return quantized


def batches(workload: Workload, count: int, seed: int = 1) -> list[torch.Tensor]:
    """Random tokens ``[batch_size, length]`` on the device."""
    if workload.device == "meta":
        return [torch.zeros(workload.batch_size, workload.length, dtype=torch.long, device="meta")] * count
    generator = torch.Generator().manual_seed(seed)
    size = (workload.batch_size, workload.length)
    vocabulary = SHAPES[workload.model]["vocab_size"]
    return [torch.randint(vocabulary, size, generator=generator).to(workload.device) for _ in range(count)]
