"""Notices training that goes on without the optimizer's ``step()``.

Hugging Face's Trainer drops ``optimizers=`` under DeepSpeed, layerwise optimizers step inside the backward
pass, and a loop may step the base alone. The taps then fire, but nobody calls the optimizer that they belong
to. The forward pass shows this without reading a value from the device. The last backward pass has left
something with the taps, and nobody has stepped or cleared since. Yet the weights were changed in place, or
the gradients are gone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from grit_optim.lora.site import Site
from grit_optim.messages import warn

PATIENCE = 3
"""Training steps around the optimizer before it warns."""


class BypassWatch:
    """Watches one site, the first whose tap fires, from one forward pass to the next."""

    def __init__(self) -> None:
        self._position: int | None = None
        self._weight_version = -1
        self._rounds = 0
        self._finished = False

    def stepped(self) -> None:
        """Start counting anew: the optimizer has stepped or cleared its gradients."""
        self._rounds = 0
        self._weight_version = -1

    def watches(self, position: int) -> bool:
        """Whether a forward pass of the site at ``position`` is of interest."""
        return not self._finished and self._position in (None, position)

    def forward(self, position: int, site: Site, fired: int, inner: Callable[[], Tensor | None]) -> None:
        """Compare with the last forward pass. Warn after :data:`PATIENCE` steps of another optimizer.

        Args:
            position: the site's place among all sites, one that :meth:`watches` accepts.
            site: the site.
            fired: backward passes that its tap saw since the optimizer stepped or cleared.
            inner: gives Σ h·δ over their tokens, or None. It is not finite after an overflow, which is why a
                GradScaler skips a step.
        """
        self._position = position
        weight, last = site.a, self._weight_version
        self._weight_version = weight._version
        if fired == 0 or last < 0 or (weight._version == last and weight.grad is not None):
            return
        self._rounds += 1
        if self._rounds < PATIENCE:
            return
        self._rounds = 0
        seen = inner()
        if seen is not None and not bool(seen.isfinite()):
            return
        self._finished = True
        warn(
            f"this model has been trained for {PATIENCE} steps without GritOptimizer.step(): the weights of "
            f"{site.name!r} were changed, or their gradients cleared, by somebody else. So GRIT does "
            "nothing. Possible causes: transformers' Trainer drops optimizers= under DeepSpeed and FSDP "
            "(train without them); some optimizers step inside the backward pass; the loop calls "
            "optimizer.base.step() or builds an optimizer of its own. Call step() of the GritOptimizer in "
            "the loop, or close() if it is no longer wanted",
        )
