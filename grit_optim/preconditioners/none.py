"""No use of the curvature."""

from __future__ import annotations

from grit_optim.preconditioners.mode import Mode


class Identity(Mode):
    """``"none"``: the base optimizer, bit for bit."""

    name = "none"
    holds_gradients = False
    uses = frozenset()
