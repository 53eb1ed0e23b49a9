"""The configuration of a fine-tuning run, and the recipes of earlier systems."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.files import BenchmarkError

TRAINERS = ("hf", "loop")
QUANTIZATIONS = ("none", "nf4")
PRECISIONS = ("fp32", "bf16")
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}  # transformers' names
ALL_LINEAR = "all-linear"
MAX_LENGTH = 2048
RECIPES: dict[str, dict[str, Any]] = {
    # The GRIT library's five example scripts: their configuration's defaults, and transformers' where they
    # set none.
    "library": {
        "optimizer": "grit-paper",
        "alpha": 32,
        "lr": 2e-5,
        "weight_decay": 0.0,
        "warmup": 0,
        "epochs": 3.0,
        "default_length": 1024,
    },
    # The comparison of 8-bit AdamW and GRIT under QLoRA; clipping is transformers' default, which it leaves
    # alone.
    "study": {"quantize": "nf4", "batch_size": 2, "clip": 1.0, "seed": 3407},
}
"""Defaults that replace the configuration's, by name; the command line's values come first.

`default_length` stands for `--max-length` where the model reads so many tokens.
"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides the outcome on given model, data and code. It names no path of the machine.

    Attributes:
        model: the hub's id, or the folder's own name.
        dataset: the data's name, or the file's name without its ending.
        max_length: tokens of prompt and answer together; longer examples are left out.
        train_examples: at most so many, drawn at random; None: all that fit. The same for `eval_examples`.
        generate_examples: held-out questions that are answered by generation, where the data call for it.
        dropout: LoRA's; drawn anew at every step from the seed and the step alone.
        target_modules: "all-linear", or the names of the layers, separated by commas.
        precision: of the forward pass; "bf16" keeps the frozen weights in it, and the adapters in fp32.
            Products with nf4 weights are in bf16 in either.
        steps: updates; each takes `batch_size` × `accumulation` examples.
        warmup: steps over which the rate rises from 0.
        clip: bound on the gradient's norm; 0: none.
        base: the optimizer that GRIT wraps.
    """

    model: str
    dataset: str
    revision: str | None = None
    max_length: int = MAX_LENGTH
    train_examples: int | None = None
    eval_examples: int | None = 256
    generate_examples: int = 64
    max_new_tokens: int = 256
    quantize: str = "none"
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    rank: int = 16
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str = ALL_LINEAR
    rslora: bool = False
    trainer: str = "hf"
    optimizer: str = "grit"
    base: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 200
    batch_size: int = 8
    accumulation: int = 4
    schedule: str = "linear"
    warmup: int = 5
    clip: float = 1.5
    seed: int = 42
    eval_every: int = 50
    device: str = "cpu"

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings in which a saved configuration differs, as `name (then → now)`."""
        now = asdict(self)
        return [
            f"{name} ({other.get(name)} → {now.get(name)})"
            for name in sorted({*now, *other})
            if other.get(name) != now.get(name)
        ]


def steps_of(epochs: float, examples: int, config: FinetuneConfig) -> int:
    """Steps in `epochs` passes over the training examples, at least 1."""
    return max(1, round(epochs * examples / (config.batch_size * config.accumulation)))


def check(config: FinetuneConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        BenchmarkError: With the remedy.
    """
    if config.warmup >= config.steps:
        raise BenchmarkError(
            f"--warmup {config.warmup} leaves no step at the full rate in a run of {config.steps} steps; "
            "lower it, or raise --steps"
        )
