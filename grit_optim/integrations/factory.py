"""For trainers that build or wrap the model themselves, so that no optimizer can be built on it before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from grit_optim.optimizer import GritOptimizer
from grit_optim.options import DECLARED
from grit_optim.options.former import FORMER

OPTIONS = {*DECLARED, *FORMER}
"""Keywords that are GritOptimizer's; all others are the base's."""


@overload
def for_trainer() -> Callable[..., GritOptimizer]: ...


@overload
def for_trainer(
    model: nn.Module, *, lr: float, base: Callable[..., Optimizer] = ..., **keywords: Any
) -> GritOptimizer: ...


def for_trainer(model: nn.Module | None = None, **keywords: Any) -> Any:
    """A GritOptimizer for a trainer: built by the trainer, or built now on the model that the trainer has made.

    ``Trainer(..., optimizer_cls_and_kwargs=(for_trainer, {"lr": 2e-4}))``: transformers from 5.2 on calls it
    as ``for_trainer()(model, **kwargs)`` once the model has its adapter. Older ones hand over parameter
    groups instead of the
    model: there, ``trainer.optimizer = for_trainer(trainer.model, lr=2e-4)`` before ``train()``, or the same
    in an override of ``create_optimizer``; both work in either.

    Args:
        model: the PEFT model, or None for the factory.
        **keywords: with a model, those of :func:`build`.

    Returns:
        :func:`build` itself without a model, else the GritOptimizer that it builds.

    Raises:
        TypeError: keywords without a model, or something that is no model.
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
    model: nn.Module, *, lr: float, base: Callable[..., Optimizer] = torch.optim.AdamW, **keywords: Any
) -> GritOptimizer:
    """A GritOptimizer over ``base`` on the trainable parameters of ``model``.

    Args:
        model: the PEFT model.
        lr: learning rate. The Trainer does not tell the factory ``args.learning_rate``, so it has to be given
            here.
        base: class of the base optimizer, or any callable of parameter groups and keywords.
        **keywords: those that GritOptimizer has go to it, all others (weight_decay, betas, …) to ``base``. As
            in the Trainer, only matrices decay: biases and the weights of norms are a group with a
            ``weight_decay`` of 0.

    Raises:
        ValueError: the model has nothing to train, or no LoRA pair.
        TypeError: a keyword that neither knows.
    """
    options = {name: value for name, value in keywords.items() if name in OPTIONS}
    settings = {name: value for name, value in keywords.items() if name not in OPTIONS}
    return GritOptimizer(base(_groups(model, settings), lr=lr, **settings), model, **options)


def _groups(model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Matrices, and what does not decay; a group that would be empty is left out."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "no parameter of the model requires a gradient; add the adapter before the optimizer is built"
        )
    matrices, vectors = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    if vectors:
        groups.append({"params": vectors, **({"weight_decay": 0.0} if "weight_decay" in settings else {})})
    return groups
