"""Whether the gradients that backward passes have accumulated are still there.

A backward pass need not be a training step: somebody looks at its gradients and clears them, by
``model.zero_grad()`` or ``p.grad = None``. No hook tells. But the gradient that a pass has left is known, as
an object and by torch's count of its changes in place. One that has changed since is looked at: clipped or
unscaled it is still there, zeroed it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from grit_optim.processes import shards


class Left(NamedTuple):
    """A parameter's gradient as a backward pass has left it.

    Attributes:
        gradient: the tensor; None where the pass ended without one, since a hook has taken it away.
        version: how often it had been changed in place; None where torch does not count, as of tensors made
            in inference mode.
    """

    gradient: TensorWeakRef | None
    version: int | None

    @classmethod
    def of(cls, parameter: Tensor) -> Left:
        """The gradient as it is now."""
        gradient = parameter.grad
        return cls(None, 0) if gradient is None else cls(TensorWeakRef(gradient), _changes_of(gradient))

    def unchanged(self, gradient: Tensor) -> bool:
        """Whether ``gradient`` is that tensor, with the values of then, as far as torch counts changes."""
        known = self.gradient() if self.gradient is not None else None
        return known is gradient and self.version is not None and _changes_of(gradient) == self.version


def _changes_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class KeptGradients:
    """Follows the gradients of pairs.

    Args:
        weights: A and B of each pair.

    Attributes:
        left: for each pair, the gradients of A (0) and B (1) that backward passes have reached, as they left
            them.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._weights = list(weights)
        self.forget_all()

    def forget_all(self) -> None:
        """Know of no gradient."""
        self.left: list[dict[int, Left]] = [{} for _ in self._weights]

    def forget(self, positions: Iterable[int]) -> None:
        """Know of no gradient of the pairs at ``positions``."""
        for position in positions:
            self.left[position] = {}

    def note(self, position: int, side: int) -> None:
        """Take note that a backward pass has reached the gradient of A (0) or B (1) of a pair."""
        self.left[position][side] = Left.of(self._weights[position][side])

    def accept(self, positions: Iterable[int]) -> None:
        """Take the gradients of the pairs at ``positions`` for what the passes have left, as they are now."""
        for position in positions:
            for side in self.left[position]:
                self.note(position, side)

    def look(self, positions: Iterable[int], stepping: bool) -> tuple[list[int], dict[int, list[Tensor]]]:
        """Which pairs have lost all that backward passes have left.

        Args:
            positions: the pairs to look at.
            stepping: whether the base is about to step. A gradient that a hook has taken away in the backward
                pass may come back before that, but not later.

        Returns:
            The pairs whose gradients are gone, and those whose gradients may be zero, with these.
        """
        cleared, doubtful = [], {}
        for position in positions:
            changed: list[Tensor] = []
            for side, left in self.left[position].items():
                gradient = self._weights[position][side].grad
                if gradient is None:
                    if left.gradient is None and not stepping:
                        break
                elif left.unchanged(gradient):
                    break
                else:
                    changed.append(gradient)
            else:
                if changed:
                    doubtful[position] = changed
                else:
                    cleared.append(position)
        return cleared, doubtful


def nonzero(doubtful: Mapping[int, Sequence[Tensor]]) -> dict[int, Tensor]:
    """For each pair, whether any entry of its gradients is not zero: a boolean scalar, left on the device.

    Where processes share gradients out, each looks at its own rows, and so decides for its own tokens alone.
    Of a pair of which it has no row it takes it that it is as the others are: they are cleared together.
    """
    sizes: dict[int, Tensor] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for position, gradients in doubtful.items():
        for part in map(shards.local, gradients):
            if part.numel():
                alike.setdefault((part.device, part.dtype), []).append((position, part))
    for members in alike.values():
        largest = torch._foreach_norm([part for _, part in members], torch.inf)
        for (position, _), size in zip(members, largest, strict=True):
            lives = size != 0
            sizes[position] = sizes[position] | lives if position in sizes else lives
    if len(sizes) < len(doubtful):
        seen = list(sizes.values()) or [torch.ones((), dtype=torch.bool, device="cpu")]
        any_lives = torch.stack([lives.to(seen[0].device) for lives in seen]).any()
        sizes |= dict.fromkeys(doubtful.keys() - sizes.keys(), any_lives)
    return sizes
