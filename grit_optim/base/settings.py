"""What a base optimizer's settings say: its learning rate, weight decay, and how fast its average forgets.

Settings and classes are recognised by name. Any optimizer that uses the field's names is served, and none has
to be imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.base.bitsandbytes import kernel

# Signs of decoupled weight decay (Loshchilov and Hutter 2019), lr·weight_decay outside the gradient: parts of
# class names, kernels of bitsandbytes, and settings that say it.
_DECOUPLED_NAMES = ("AdamW", "Lion", "Muon", "Adafactor")
_DECOUPLED_KERNELS = ("adam", "ademamix", "lamb", "lion")
# Classes whose update is Adam's: of torch, torchao, apex, timm, schedulefree and pytorch_optimizer.
_ADAMS = {
    "Adam", "AdamW", "Adamax", "AdaMax", "NAdam", "NAdamW", "RAdam", "SparseAdam",
    "_AdamBase", "FusedAdam", "AdamC", "AdamMini", "AdamP", "AdamS", "AdamWSN", "FAdam", "FlashAdamW",
    "GrokFastAdamW", "QHAdam", "StableAdamW", "DAdaptAdam",
    "AdamWScheduleFree", "AdamWScheduleFreePaper", "AdamWScheduleFreeReference", "RAdamScheduleFree",
    "ScheduleFreeAdamW", "ScheduleFreeRAdam",
}  # fmt: skip
_ADAM_KERNELS = ("adam",)
_DECOUPLED_FLAGS = ("decoupled_weight_decay", "weight_decouple", "decouple_weight_decay")


def group_by_parameter(base: Optimizer) -> dict[int, dict[str, Any]]:
    """``id(parameter)`` to the parameter group that holds it now.

    Groups are reordered, deleted and replaced, and parameters moved between them, in the course of training.
    """
    return {id(p): group for group in base.param_groups for p in group["params"]}


def rate(settings: dict[str, Any]) -> float | Tensor:
    """The learning rate of a parameter group in the step just taken.

    Schedule-free optimizers warm the rate up themselves, and keep what they used beside ``lr``.
    """
    return settings["scheduled_lr"] if "scheduled_lr" in settings else settings["lr"]


def decoupled_decay(
    base: Optimizer, settings: dict[str, Any], parameters: Sequence[Tensor]
) -> float | Tensor:
    """The share of the weights that ``base`` takes off beside its update in one step: rate·weight_decay or 0.

    Args:
        base: the base optimizer, after its step.
        settings: one of its parameter groups.
        parameters: m parameters of that group.

    Returns:
        A number, or ``[m, 1, 1]`` where each parameter has a rate of its own (transformers' Adafactor).
    """
    decay = settings.get("weight_decay", 0.0)
    if not decay or not _decouples(base, settings):
        return 0.0
    if settings.get("scale_parameter") or settings.get("relative_step"):
        rates = [base._get_lr(settings, base.state[p]) for p in parameters]  # type: ignore[attr-defined]
        device = parameters[0].device
        stacked = torch.stack([torch.as_tensor(r, dtype=torch.float32, device=device) for r in rates])
        return decay * stacked[:, None, None]
    return rate(settings) * decay


def coupled_decay(base: Optimizer, settings: dict[str, Any]) -> float:
    """The factor with which ``base`` adds the weights to the gradient (an L2 penalty); 0 if it does not."""
    return 0.0 if _decouples(base, settings) else settings.get("weight_decay", 0.0)


def _decouples(base: Optimizer, settings: dict[str, Any]) -> bool:
    """Whether weight decay, if any, stays outside the gradient."""
    flags = [settings[name] for name in _DECOUPLED_FLAGS if name in settings]
    if flags:
        return bool(flags[0])
    if (update := kernel(base)) is not None:
        return update in _DECOUPLED_KERNELS
    return any(name in type(base).__name__ for name in _DECOUPLED_NAMES)


def is_adam(base: Optimizer) -> bool:
    """Whether the base makes Adam's update, whose entries are of the size of the learning rate.

    The class that wrote ``step()`` decides, by its exact name. Of others that are called after Adam some step
    by another measure: PAdam (Chen et al. 2018) divides by a smaller power, so its learning rate means a
    hundred times as much. A ``step()`` that calls the parent's is taken for the parent's.
    """
    if (update := kernel(base)) is not None:
        return update in _ADAM_KERNELS
    for kind in type(base).__mro__:
        if "step" in vars(kind):
            step = inspect.unwrap(vars(kind)["step"])
            if "__class__" not in step.__code__.co_freevars:  # there where super() is called
                # torch wraps the step of the first class that is used, which may have inherited it.
                return step.__qualname__.split(".")[-2] in _ADAMS
    return False


def finds_its_rate(base: Optimizer) -> bool:
    """Whether the base finds its learning rate itself. D-Adaptation and Prodigy do, and keep it as ``d``."""
    return any("d" in group for group in base.param_groups)


def moment_decay(settings: Mapping[str, Any]) -> float:
    """The share that the base's average of the gradient keeps per step: Adam's β₁, SGD's momentum, else 0."""
    return float(settings["betas"][0] if "betas" in settings else settings.get("momentum", 0.0))
