"""Notices training that goes on without the optimizer's ``step()``.

Hugging Face's Trainer drops ``optimizers=`` under DeepSpeed, layerwise optimizers step inside the backward
pass, and a loop may step the base alone. The taps then fire, but nobody calls the optimizer that they belong
to. The forward pass shows this without reading a value from the device. The last backward pass has left
something with the taps, and nobody has stepped or cleared since. Yet the weights were changed in place, or
the gradients are gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grit_optim.messages import warn

PATIENCE = 3
"""Training steps around the optimizer before it warns."""


class BypassWatch:
    """Watches one site, the first whose tap fires, from one forward pass to the next."""

    def __init__(self) -> None:
        self._position: int | None = None
        self._finished = False
        self.stepped()

    def stepped(self) -> None:
        """Start counting anew: the optimizer has stepped or cleared its gradients."""
        self._rounds = 0
        self._weight_version = -1
        self._before: list[Tensor] = []  # A and B as they were in the first round that counted

    def watches(self, position: int) -> bool:
        """Whether a forward pass of the site at ``position`` is of interest."""
        return not self._finished and self._position in (None, position)

    def forward(self, position: int, name: str, weights: Sequence[Tensor], fired: int) -> None:
        """Compare with the last forward pass. Warn after :data:`PATIENCE` steps of another optimizer.

        Gradients may also be cleared because somebody only wanted to look at them, or because a GradScaler
        skips a step. The weights then are what they were.

        Args:
            position: the site's place among all sites, one that :meth:`watches` accepts.
            name: the site's name.
            weights: its A and B.
            fired: backward passes that its tap saw since the optimizer stepped or cleared.
        """
        self._position = position
        weight, last = weights[0], self._weight_version
        self._weight_version = weight._version
        if fired == 0 or last < 0 or (weight._version == last and weight.grad is not None):
            return
        self._rounds += 1
        if self._rounds < PATIENCE:
            self._before = self._before or [w.detach().clone() for w in weights]
            return
        before, self._before, self._rounds = self._before, [], 0
        if all(torch.equal(old, new) for old, new in zip(before, weights, strict=True)):
            return
        self._finished = True
        warn(
            f"this model has been trained for {PATIENCE} steps without GritOptimizer.step(): the weights of "
            f"{name!r} were changed, or their gradients cleared, by somebody else. So GRIT does "
            "nothing. Possible causes: transformers' Trainer drops optimizers= under DeepSpeed and FSDP "
            "(train without them); some optimizers step inside the backward pass; the loop calls "
            "optimizer.base.step() or builds an optimizer of its own. Call step() of the GritOptimizer in "
            "the loop, or close() if it is no longer wanted",
        )
