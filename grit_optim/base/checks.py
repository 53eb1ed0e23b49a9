"""Which optimizers can be wrapped."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from grit_optim.base.settings import is_adam, moment_decay

_IN_BACKWARD = "updates the weights during the backward pass, before step() can prepare any gradient"
_REFUSED = {
    "cpuoffload": "works on copies of the weights and gradients on the host, which GRIT's changes of either never reach",
    "deepspeedcpu": "works on copies of the weights and gradients on the host, which GRIT's changes of either never reach",
    "layerwise": _IN_BACKWARD,
    "lomo": _IN_BACKWARD,
}
"""By a part of the class's name, in lower case: none of these packages need be there to know them."""


def check_base(base: object) -> None:
    """Refuse what cannot be a base optimizer.

    Raises:
        TypeError: ``base`` is no ``torch.optim.Optimizer``, or is one that evaluates the loss several times
            per step, acts during the backward pass, or works on copies of the weights.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(
            "the first argument must be a torch.optim.Optimizer such as "
            f"torch.optim.AdamW(model.parameters(), lr=2e-4), got {type(base).__name__}"
        )
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates the loss several times per step, and curvature would be gathered from all of "
            "them; use a first-order base such as torch.optim.AdamW"
        )
    for kind in type(base).__mro__:
        reason = next((why for word, why in _REFUSED.items() if word in kind.__name__.lower()), None)
        if reason is not None:
            raise TypeError(
                f"{type(base).__name__} cannot be a base optimizer: it {reason}; use torch.optim.AdamW or "
                "the like"
            )
    if hasattr(base, "check_capture"):
        raise TypeError("the base optimizer is a GritOptimizer already; wrap the plain optimizer once")


def check_direction_momentum(momentum: float | str | None, base: Optimizer) -> None:
    """Refuse a ``direction_momentum`` for a base that keeps no average of the gradient, or one of a kind that is not known.

    Raises:
        ValueError: the base is neither a kind of Adam with β₁ > 0 nor SGD with momentum.
    """
    if momentum in (None, "base"):
        return
    known = is_adam(base) or "dampening" in base.defaults
    if not known or any(moment_decay(group) == 0 for group in base.param_groups):
        raise ValueError(
            f"direction_momentum={momentum!r} is for the average of the gradient that a base keeps, and "
            f"{type(base).__name__} keeps none here, or one of another kind; leave it out, or wrap a kind "
            "of Adam with β₁ > 0, or SGD with momentum"
        )
