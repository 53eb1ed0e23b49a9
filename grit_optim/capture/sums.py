"""Sums over the tokens of one step, from which the K-FAC factors are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class KindSums(NamedTuple):
    """Sums over one step's tokens of each of K kinds, for each site of a bucket.

    Attributes:
        activation: Σ h hᵀ, ``[S, K, r, r]``.
        gradient: Σ δ δᵀ, ``[S, K, r, r]``.
        rows: number of tokens with δ ≠ 0, ``[S, K]``.
    """

    activation: Tensor
    gradient: Tensor
    rows: Tensor

    @classmethod
    def zeros(cls, sites: int, kinds: int, rank: int, device: torch.device) -> KindSums:
        """Sums over no tokens."""
        matrix = torch.zeros(sites, kinds, rank, rank, dtype=torch.float32, device=device)
        return cls(matrix, matrix.clone(), torch.zeros(sites, kinds, dtype=torch.float32, device=device))


@dataclass(eq=False)
class Sums:
    """Sums over one step's tokens, for each site of a bucket.

    Attributes:
        activation: Σ over tokens of h hᵀ, ``[S, r, r]``.
        gradient: Σ over tokens of δ δᵀ, ``[S, r, r]``.
        rows: number of tokens with δ ≠ 0 in the two sums, ``[S]``. Tokens with δ = 0 are in neither.
        tokens: number of tokens with δ ≠ 0 that the step had, ``[S]``. ``rows`` of them were taken; by
            default all.
        kinds: the same three sums over the tokens of each kind, where kinds are told apart; else None.
    """

    activation: Tensor
    gradient: Tensor
    rows: Tensor
    tokens: Tensor = None  # type: ignore[assignment]
    kinds: KindSums | None = None

    def __post_init__(self) -> None:
        if self.tokens is None:
            self.tokens = self.rows.clone()

    @classmethod
    def zeros(cls, sites: int, rank: int, device: torch.device, kinds: int = 0) -> Sums:
        """Sums over no tokens, of so many kinds."""
        shape = (sites, rank, rank)
        matrix = torch.zeros(shape, dtype=torch.float32, device=device)
        count = torch.zeros(sites, dtype=torch.float32, device=device)
        of_kinds = KindSums.zeros(sites, kinds, rank, device) if kinds else None
        return cls(matrix, matrix.clone(), count, count.clone(), of_kinds)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the attributes, each with a row per site."""
        return self.activation, self.gradient, self.rows, self.tokens, *(self.kinds or ())

    def leave_out(self, sites: Tensor) -> None:
        """Let the sums of the chosen sites, boolean ``[S]``, be over no tokens."""
        for tensor in self.tensors():
            tensor.copy_(torch.where(sites.view(-1, *[1] * (tensor.dim() - 1)), 0.0, tensor))

    def is_finite(self) -> Tensor:
        """A boolean scalar on the bucket's device: no entry is infinite or NaN."""
        return torch.isfinite(self.activation).all() & torch.isfinite(self.gradient).all()
