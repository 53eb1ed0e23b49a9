"""Sums over the tokens of one step, from which the K-FAC factors are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Sums:
    """Sums over one step's tokens, for each site of a bucket.

    Attributes:
        activation: Σ over tokens of h hᵀ, ``[S, r, r]``.
        gradient: Σ over tokens of δ δᵀ, ``[S, r, r]``.
        rows: number of tokens with δ ≠ 0 in the two sums, ``[S]``. Tokens with δ = 0 are in neither.
        tokens: number of tokens with δ ≠ 0 that the step had, ``[S]``. ``rows`` of them were taken; by
            default all.
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
        matrix = torch.zeros(shape, dtype=torch.float32, device=device)
        count = torch.zeros(sites, dtype=torch.float32, device=device)
        return cls(matrix, matrix.clone(), count, count.clone())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, in the order of the attributes."""
        return self.activation, self.gradient, self.rows, self.tokens

    def leave_out(self, sites: Tensor) -> None:
        """Let the sums of the chosen sites, boolean ``[S]``, be over no tokens."""
        for tensor in self.tensors():
            tensor.copy_(torch.where(sites.view(-1, *[1] * (tensor.dim() - 1)), 0.0, tensor))

    def is_finite(self) -> Tensor:
        """A boolean scalar on the bucket's device: no entry is infinite or NaN."""
        return torch.isfinite(self.activation).all() & torch.isfinite(self.gradient).all()
