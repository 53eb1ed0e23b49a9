"""The optimizers that can be compared, by name; each is a function of the model and the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .files import BenchmarkError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Settings:
    """What every factory is given; `options` go to the optimizer's own constructor."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


Factory = Callable[["torch.nn.Module", Settings], "torch.optim.Optimizer"]


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adamw(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(
        _trainable(model),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        **settings.options,
    )


def _grit(**fixed: Any) -> Factory:
    """GRIT around AdamW; `fixed` are the keywords that make the variant, the settings' options come on top."""

    def factory(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
        """The variant over the model's trainable parameters."""
        from grit_optim import GritOptimizer

        base = _adamw(model, Settings(settings.lr, settings.betas, settings.weight_decay))
        return GritOptimizer(base, model, **{**fixed, **settings.options})

    return factory


def _grit_paper(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    from grit_optim import presets

    return _grit(**presets.PAPER)(model, settings)


OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adamw,
    "grit": _grit(),
    "grit-eigenbasis": _grit(precondition="eigenbasis"),
    "grit-steer": _grit(precondition="steer"),
    "grit-balanced": _grit(precondition="balanced"),
    "grit-inverse": _grit(precondition="inverse"),
    "grit-none": _grit(precondition="none"),
    "grit-paper": _grit_paper,
}


def check_optimizer(name: str) -> str:
    """The name itself, or an error that lists the known ones."""
    if name not in OPTIMIZERS:
        raise BenchmarkError(f"unknown optimizer {name!r}; known: {', '.join(sorted(OPTIMIZERS))}")
    return name


def make_optimizer(name: str, model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of that name over the model's trainable parameters."""
    factory = OPTIMIZERS[check_optimizer(name)]
    try:
        return factory(model, settings)
    except ImportError as error:
        raise BenchmarkError(f"optimizer {name!r} needs {error.name}: {error}; pip install -e '.[bench]'") from error


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a state dict, nested dicts, lists and tuples included."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(state_bytes, state.values()))
    return sum(map(state_bytes, state)) if isinstance(state, list | tuple) else 0
