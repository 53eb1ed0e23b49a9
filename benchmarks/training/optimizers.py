"""The optimizers that can be compared, by name; each is a function of the model and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from grit_optim import GritOptimizer, modality_groups, presets

from ..core.environment import installed_version
from ..core.files import BenchmarkError
from ..core.settings import Factory, Settings, trainable
from ..peers.registry import PEERS

PART_RATES = "part_rates"  # the option with a factor of the rate for each modality


def _groups(model: torch.nn.Module, lr: float, factors: Mapping[str, float]) -> list[Any]:
    """Parameters, or groups that give each part of a multimodal model its own rate."""
    if not factors:
        return trainable(model)
    rates: dict[str, Any] = {part: {"lr": lr * factor} for part, factor in factors.items()}
    try:
        return modality_groups(model, **rates)
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"--option {PART_RATES}: {error}") from error


def _adamw(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    options = dict(settings.options)
    groups = _groups(model, settings.lr, options.pop(PART_RATES, {}))
    return torch.optim.AdamW(groups, **settings.adam(), **options)


def _grit(**fixed: Any) -> Factory:
    """GRIT around the settings' base, with the variant's keywords `fixed` and then the settings' options."""

    def factory(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
        """The variant over the model's trainable parameters."""
        options = dict(settings.options)
        rates = {PART_RATES: options.pop(PART_RATES)} if PART_RATES in options else {}
        base = make_optimizer(
            settings.base, model, Settings(settings.lr, settings.betas, settings.weight_decay, rates)
        )
        return GritOptimizer(base, model, **{**fixed, **options})

    return factory


def _grit_paper(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return _grit(**presets.PAPER)(model, settings)


OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adamw,
    "grit": _grit(),
    "grit-eigenbasis": _grit(precondition="eigenbasis"),
    "grit-steer": _grit(precondition="steer"),
    "grit-balanced": _grit(precondition="balanced"),
    "grit-inverse": _grit(precondition="inverse"),
    "grit-none": _grit(precondition="none"),
    "grit-gradients": _grit(capture="gradients"),
    "grit-paper": _grit_paper,
    **{name: peer.factory for name, peer in PEERS.items()},
}


def check_optimizer(name: str) -> str:
    """The name itself, or an error that lists the known ones."""
    if name not in OPTIMIZERS:
        raise BenchmarkError(f"unknown optimizer {name!r}; known: {', '.join(sorted(OPTIMIZERS))}")
    return name


def check_base(optimizer: str, base: str) -> str:
    """The base's name itself, or an error: only GRIT wraps another optimizer, and not itself."""
    if base != Settings.base and not optimizer.startswith("grit"):
        raise BenchmarkError(
            f"optimizer {optimizer!r} wraps no other, so it cannot have the base {base!r}; only grit can"
        )
    if check_optimizer(base).startswith("grit"):
        raise BenchmarkError(
            f"the base {base!r} is GRIT itself; name what it is to wrap, such as adamw or adamw8bit"
        )
    return base


def make_optimizer(name: str, model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of that name over the model's trainable parameters."""
    factory = OPTIMIZERS[check_optimizer(name)]
    try:
        return factory(model, settings)
    except ImportError as error:
        package, extra = (PEERS[name].package, "peers") if name in PEERS else (error.name, "bench")
        raise BenchmarkError(
            f"optimizer {name!r} needs {package}: {error}; pip install -e '.[{extra}]'"
        ) from error


def package_version(name: str) -> dict[str, str | None]:
    """The distribution of a peer's update rule with its version; empty for GRIT and plain AdamW."""
    return {PEERS[name].package: installed_version(PEERS[name].package)} if name in PEERS else {}


def state_tensors(state: Any) -> list[torch.Tensor]:
    """All tensors in a state dict, each once.

    Dicts, lists and tuples are gone through, and so are the attributes of any other object: some packages
    keep their matrices in classes of their own.
    """
    seen: set[int] = set()

    def collect(value: Any) -> list[torch.Tensor]:
        """The tensors in `value` that have not been met yet."""
        if id(value) in seen or isinstance(value, str | bytes | int | float | type | None):
            return []
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            return [value]
        items = value if isinstance(value, list | tuple | dict) else getattr(value, "__dict__", {})
        return [
            tensor
            for item in (items.values() if isinstance(items, dict) else items)
            for tensor in collect(item)
        ]

    return collect(state)


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a state dict, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(state))
