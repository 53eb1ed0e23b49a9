"""Build a GritOptimizer for a trainer that makes or wraps the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from grit_optim.lora.by_modality import modality_groups
from grit_optim.messages import nearest
from grit_optim.optimizer import GritOptimizer
from grit_optim.options import DECLARED
from grit_optim.options.declared import MODALITIES
from grit_optim.options.former import FORMER

OPTIONS = {*DECLARED, *FORMER, "modality_of", "process_group"}
"""Keywords that go to GritOptimizer; all others go to the base."""


@overload
def for_trainer() -> Callable[..., GritOptimizer]: ...


@overload
def for_trainer(
    model: nn.Module, *, lr: float, base: Callable[..., Optimizer] = ..., **keywords: Any
) -> GritOptimizer: ...


def for_trainer(model: nn.Module | None = None, **keywords: Any) -> Any:
    """A GritOptimizer that the trainer builds, or that is built now on the trainer's model.

    transformers from 5.2 on takes ``Trainer(..., optimizer_cls_and_kwargs=(for_trainer, {"lr": 2e-4}))`` and
    calls ``for_trainer()(model, **kwargs)`` once the model has its adapter. Earlier versions hand over
    parameter groups and not the model. Set ``trainer.optimizer = for_trainer(trainer.model, lr=2e-4)`` before
    ``train()`` there, or in an override of ``create_optimizer``. This works in later versions too.

    Args:
        model: the PEFT model, or None for the factory.
        **keywords: of :func:`build`, where there is a model.

    Returns:
        The GritOptimizer that :func:`build` makes; without a model, :func:`build` itself.

    Raises:
        TypeError: there are keywords and no model, ``model`` is no module, there is no ``lr``, or a keyword
            that nobody knows.
        ValueError: the model has nothing to train, or no LoRA pair.
    """
    if isinstance(model, nn.Module):
        return build(model, **keywords)
    if model is not None:
        raise TypeError(
            f"for_trainer() got a {type(model).__name__} where the model is needed: transformers before 5.2 "
            "hands parameter groups, not the model, to optimizer_cls_and_kwargs. Set `trainer.optimizer = "
            "grit_optim.for_trainer(trainer.model, lr=...)` before train(); with model_init, do so in an "
            "override of Trainer.create_optimizer"
        )
    if keywords:
        raise TypeError(
            f"for_trainer() got {', '.join(keywords)} and no model; pass the pair optimizer_cls_and_kwargs="
            "(grit_optim.for_trainer, {'lr': ...}), or the model first: grit_optim.for_trainer(model, lr=...)"
        )
    return build


def build(
    model: nn.Module,
    *,
    lr: float | None = None,
    base: Callable[..., Optimizer] = torch.optim.AdamW,
    **keywords: Any,
) -> GritOptimizer:
    """A GritOptimizer over ``base`` on the trainable parameters of ``model``.

    Args:
        model: the PEFT model.
        lr: learning rate, to be given. The Trainer does not pass ``args.learning_rate`` to a factory.
        base: class of the base optimizer, or any callable of parameter groups and keywords.
        **keywords: options of GritOptimizer go to it, ``vision=``, ``audio=``, ``cross_modal=`` and ``text=``
            to :func:`modality_groups`, all others (weight_decay, betas, …) to ``base``. Only matrices decay,
            as in the Trainer: biases and the weights of norms are a group with a ``weight_decay`` of 0.

    Raises:
        ValueError: the model has nothing to train, or no LoRA pair.
        TypeError: there is no ``lr``, or neither GritOptimizer nor ``base`` knows a keyword.
    """
    if lr is None:
        raise TypeError(
            "for_trainer() needs lr=, the learning rate: the Trainer does not pass args.learning_rate on. "
            "Give it as for_trainer(model, lr=2e-4), or optimizer_cls_and_kwargs=(for_trainer, {'lr': 2e-4})"
        )
    options = {name: value for name, value in keywords.items() if name in OPTIONS}
    parts = {name: value for name, value in keywords.items() if name in MODALITIES}
    settings = {name: value for name, value in keywords.items() if name not in {*OPTIONS, *MODALITIES}}
    _check_settings(base, settings)
    if parts:
        groups = modality_groups(model, modality_of=options.get("modality_of"), **parts)
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    return GritOptimizer(base(_groups(groups, settings), lr=lr, **settings), model, **options)


def _check_settings(base: Callable[..., Optimizer], settings: Iterable[str]) -> None:
    """Refuse keywords that nobody knows, where ``base`` says what it knows.

    Raises:
        TypeError: a keyword is unknown.
    """
    try:
        known = inspect.signature(base).parameters
    except (TypeError, ValueError):  # written in C, without a signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    unknown = [name for name in settings if name not in known]
    if unknown:
        close = nearest(unknown[0], {*DECLARED, *known})
        hint = f"did you mean {close!r}? " if close else ""
        who = getattr(base, "__name__", type(base).__name__)
        raise TypeError(
            f"for_trainer() got {', '.join(map(repr, unknown))}, which is neither an option of GritOptimizer "
            f"nor a keyword of {who}; {hint}docs/options.md lists the options"
        )


def _groups(groups: Iterable[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Each group's matrices, and its vectors, which do not decay. Groups without members are left out.

    Raises:
        ValueError: there is no member.
    """
    found: list[dict[str, Any]] = []
    for group in groups:
        matrices, vectors = (
            [p for p in group["params"] if (p.ndim > 1) is wanted] for wanted in (True, False)
        )
        if matrices:
            found.append({**group, "params": matrices})
        if vectors:
            stays = {"weight_decay": 0.0} if "weight_decay" in {*settings, *group} else {}
            found.append({**group, "params": vectors, **stays})
    if not found:
        raise ValueError(
            "no parameter of the model requires a gradient; add the adapter before the optimizer is built"
        )
    return found
