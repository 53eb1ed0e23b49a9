"""The hooks that taps are made of: on ``lora_A``, and on the gradients of A and B."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Owner(Protocol):
    """Whoever gathers what the hooks see."""

    def follow(self, position: int) -> None:
        """A forward pass uses the site, perhaps in evaluation."""

    def watch(self, position: int, output: Tensor) -> None:
        """Take note of h in a forward pass."""

    def before_gradient(self, position: int, side: int) -> None:
        """A backward pass is about to give A or B its gradient."""

    def after_gradient(self, position: int, side: int) -> None:
        """A backward pass has accumulated into the gradient of A or B."""


class Tap:
    """Forward hook on ``lora_A``.

    It holds its owner weakly, so that no model keeps an optimizer alive. A copied or unpickled model carries
    taps that do nothing; its optimizer, if it has one, puts its own there.
    """

    def __init__(self, taps: Owner | None, position: int) -> None:
        self._taps = weakref.ref(taps) if taps is not None else None
        self.position = position

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Watch for the gradient of ``output``, if it will get one."""
        taps = self.owner()
        if taps is None or not isinstance(output, Tensor):
            return
        taps.follow(self.position)
        if output.requires_grad:
            taps.watch(self.position, output)

    def owner(self) -> Owner | None:
        """What this tap belongs to; None in a copy, and after it is gone."""
        return self._taps() if self._taps is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (None, self.position)


class GradientTap:
    """Hook on A (side 0) or B (side 1), before or after a backward pass accumulates into its gradient."""

    def __init__(self, taps: Owner, position: int, side: int, before: bool) -> None:
        self._taps = weakref.ref(taps)
        self._place = position, side
        self._before = before

    def __call__(self, tensor: Tensor) -> None:
        """Tell the owner, if it is still there."""
        taps = self._taps()
        if taps is not None:
            (taps.before_gradient if self._before else taps.after_gradient)(*self._place)


def at_the_end(callback: Any) -> None:
    """Have ``callback`` called when the backward pass under way is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def remove(hooks: list[RemovableHandle]) -> None:
    """Remove hooks, and forget them."""
    for hook in hooks:
        hook.remove()
    hooks.clear()


def remove_inert_taps(module: nn.Module) -> None:
    """Take off taps that a copy of the model carried along."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Tap) and hook.owner() is None:
            del module._forward_hooks[key]
