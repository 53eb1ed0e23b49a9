"""What the tokens of one step add up to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Sums:
    """What one step's tokens add up to, per site of a bucket.

    Attributes:
        activation: Σ over tokens of h hᵀ, ``[S, r, r]``.
        gradient: Σ over tokens of δ δᵀ, ``[S, r, r]``.
        rows: number of tokens with δ ≠ 0, ``[S]``; the others are in neither sum.
        tokens: how many such tokens the step had, of which ``rows`` were taken, ``[S]``; by default all of
            them were.
    """

    activation: Tensor
    gradient: Tensor
    rows: Tensor
    tokens: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.tokens is None:
            self.tokens = self.rows.clone()

    @classmethod
    def zeros(cls, sites: int, rank: int, device: torch.device) -> Sums:
        """Sums over no tokens."""
        shape = (sites, rank, rank)
        matrix, count = torch.zeros(shape, device=device), torch.zeros(sites, device=device)
        return cls(matrix, matrix.clone(), count, count.clone())

    def is_finite(self) -> Tensor:
        """A boolean scalar on the bucket's device: no entry is infinite or NaN."""
        return torch.isfinite(self.activation).all() & torch.isfinite(self.gradient).all()
