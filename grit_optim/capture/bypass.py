"""Notices a training that goes on without the optimizer's ``step()``.

Hugging Face's Trainer drops ``optimizers=`` under DeepSpeed, layerwise optimizers step inside the backward
pass, and a loop may step the base alone. The taps fire then, and the optimizer that they belong to is never
asked. What can be seen from the forward pass, without reading a value from the device: the last backward pass
has left something with the taps, nobody has stepped or cleared since, and yet the weights were changed in
place or the gradients are gone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from grit_optim.lora.site import Site
from grit_optim.messages import warn

PATIENCE = 3
"""Training steps that go around the optimizer before it is said."""


class BypassWatch:
    """Watches one site, the first whose tap fires, from one forward pass to the next."""

    def __init__(self) -> None:
        self._position: int | None = None
        self._version = -1
        self._rounds = 0
        self._finished = False

    def stepped(self) -> None:
        """The optimizer has stepped or cleared its gradients: all is well so far."""
        self._rounds = 0
        self._version = -1

    def watches(self, position: int) -> bool:
        """Whether a forward pass of the site at that place is of interest."""
        return not self._finished and self._position in (None, position)

    def forward(self, position: int, site: Site, fired: int, inner: Callable[[], Tensor | None]) -> None:
        """Compare with the last forward pass, and warn after ``PATIENCE`` steps of somebody else's.

        Args:
            position: the site's place among all, one that is watched.
            site: the site.
            fired: backward passes since the optimizer stepped or cleared.
            inner: gives Σ h·δ of those, or None; not finite after an overflow, which is why a GradScaler
                skips a step.
        """
        self._position = position
        weight, last = site.a, self._version
        self._version = weight._version
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
            f"{site.name!r} were changed, or their gradients cleared, by somebody else, so GRIT does "
            "nothing. Something steps around it: transformers' Trainer drops optimizers= under DeepSpeed "
            "and FSDP (train without them), other optimizers step inside the backward pass, or the loop "
            "calls optimizer.base.step() or builds an optimizer of its own. Let the loop call step() of the "
            "GritOptimizer itself, or call close() on it if it is no longer wanted",
        )
