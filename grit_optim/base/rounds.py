"""Stepping some parameters at a time, with optimizers that step each one alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

_OF_TORCH = {
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
}  # fmt: skip


def steps_each_alone(base: Optimizer) -> bool:
    """Whether the base may be stepped for some parameters at a time, to the same end.

    So it is with the optimizers of torch and bitsandbytes: what they do to a parameter depends on its
    gradient and its state. Others count steps for all together, or compare parameters. A hook on the base's
    own step, or a step that was put in its place, would see several.
    """
    kind, step = type(base), vars(base).get("step")
    known = kind.__module__.startswith("torch.optim") and kind.__name__ in _OF_TORCH
    if not known and not kind.__module__.startswith("bitsandbytes"):
        return False
    # A scheduler puts a step there too, which counts nothing.
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    return not (replaced or base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks)


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Take the gradients of these parameters away while the body runs, so that a base leaves them alone."""
    kept = [(p, p.grad) for p in parameters if p.grad is not None]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        put_back(kept)


def put_back(gradients: Collection[tuple[Tensor, Tensor | None]]) -> None:
    """Give parameters these gradients; all of them also where Ctrl-C interrupts it."""
    try:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    except BaseException:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise
