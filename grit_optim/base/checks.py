"""Refusing optimizers that cannot be wrapped, and options that an optimizer cannot serve."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from grit_optim.base.settings import is_adam, moment_decay

_IN_BACKWARD = "updates the weights during the backward pass, before step() can prepare any gradient"
_ON_COPIES = "works on copies of the weights and gradients on the host, which GRIT's changes never reach"
_OWN_CLOSURE = "evaluates the loss in its own step(), where GRIT calls the closure once and before it"
_OWN_PROCESSES = "exchanges its state between processes by itself, in the coordinates that A and B had"
_REFUSED = {
    "cpuoffload": _ON_COPIES,
    "deepspeedcpu": _ON_COPIES,
    "layerwise": _IN_BACKWARD,
    "lomo": _IN_BACKWARD,
}
"""Part of a class's name, in lower case, to the reason. By name, so that no package has to be installed."""
_REFUSED_WHOLE = {
    "AliG": _OWN_CLOSURE,
    "BSAM": _OWN_CLOSURE,
    "SAM": _OWN_CLOSURE,
    "DeMo": _OWN_PROCESSES,
    "SaRA": "chooses when it is built which entries of A and B to train, and other coordinates have others",
}
"""A class's whole name to the reason."""


def check_base(base: object) -> None:
    """Refuse what cannot be a base optimizer.

    Raises:
        TypeError: ``base`` is not a ``torch.optim.Optimizer``, or it evaluates the loss several times per
            step, acts during the backward pass, or works on copies of the weights.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(
            "the first argument must be a torch.optim.Optimizer such as "
            f"torch.optim.AdamW(model.parameters(), lr=2e-4), got {type(base).__name__}"
        )
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates the loss several times per step, and curvature would be gathered from all of "
            "them. Use a first-order base such as torch.optim.AdamW"
        )
    for kind in type(base).__mro__:
        parts = (why for word, why in _REFUSED.items() if word in kind.__name__.lower())
        reason = _REFUSED_WHOLE.get(kind.__name__) or next(parts, None)
        if reason is not None:
            raise TypeError(
                f"{type(base).__name__} cannot be a base optimizer: it {reason}. Use torch.optim.AdamW, or "
                "another that changes the model's own weights in step()"
            )
    if hasattr(base, "check_capture"):
        raise TypeError("the base optimizer is a GritOptimizer already. Wrap the plain optimizer, once")


def check_direction_momentum(momentum: float | str | None, base: Optimizer) -> None:
    """Refuse ``direction_momentum`` where the base keeps no average of the gradient of a known kind.

    Args:
        momentum: the option; None and ``"base"`` suit every base.
        base: the base optimizer.

    Raises:
        ValueError: the base is neither a kind of Adam with β₁ > 0 nor SGD with momentum.
    """
    if momentum in (None, "base"):
        return
    known = is_adam(base) or "dampening" in base.defaults
    if not known or any(moment_decay(group) == 0 for group in base.param_groups):
        raise ValueError(
            f"direction_momentum={momentum!r} is for the average of the gradient that a base keeps, and "
            f"{type(base).__name__} keeps none here, or one of another kind. Leave the option out, or wrap "
            "a kind of Adam with β₁ > 0, or SGD with momentum"
        )
