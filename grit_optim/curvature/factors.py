"""The rank-space Fisher factors of a bucket, as running or decayed means over tokens.

``activation`` is Σ_a = E[h hᵀ] and ``gradient`` is Σ_g = E[δ δᵀ], each ``[S, r, r]`` in fp32 (DESIGN: the
K-FAC factors of a LoRA pair restricted to its rank, Wu et al. 2016 for the running means).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from grit_optim import linalg


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


@dataclass(eq=False)
class Factors:
    """Σ_a and Σ_g of a bucket's sites, and how much has gone into them.

    Attributes:
        activation: Σ_a ``[S, r, r]``.
        gradient: Σ_g ``[S, r, r]``; with relative damping in units of the mean over all sites of each step's
            tr(Σ_g)/r, which takes batch size, token count and loss scale out of it.
        activation_weight: total weight in the mean ``[S]``.
        gradient_weight: total weight in the mean ``[S]``.
        activation_samples: tokens seen ``[S]``.
        gradient_samples: tokens seen ``[S]``.
        price: what dropping coordinates costs per unit of their ``tr(Σ_g Σ_a)``, in units of the loss
            ``[S]``: ½·N·T, where the loss is a mean over N tokens and T tokens of a step reach the site (see
            :meth:`fold`).
    """

    activation: Tensor
    gradient: Tensor
    activation_weight: Tensor
    gradient_weight: Tensor
    activation_samples: Tensor
    gradient_samples: Tensor
    price: Tensor

    @classmethod
    def zeros(cls, sites: int, rank: int, device: torch.device) -> Factors:
        """Factors that have seen nothing."""
        matrix, scalar = torch.zeros(sites, rank, rank, device=device), torch.zeros(sites, device=device)
        return cls(matrix, matrix.clone(), scalar, *(scalar.clone() for _ in range(4)))

    def forget(self, sites: Tensor) -> None:
        """Let the chosen sites ``[S]`` (boolean) be as if nothing had been seen of them."""
        for known in fields(self):
            value = getattr(self, known.name)
            setattr(self, known.name, torch.where(sites.view(-1, *[1] * (value.dim() - 1)), 0.0, value))

    def ready(self, min_samples: int) -> tuple[Tensor, Tensor]:
        """Which sites' Σ_a and Σ_g have at least ``min_samples`` tokens: two boolean tensors ``[S]``."""
        floor = max(min_samples, 1)
        return self.activation_samples >= floor, self.gradient_samples >= floor

    def fold(
        self,
        sums: Sums,
        accept: Tensor,
        decay: float | None,
        gradient_unit: Tensor,
        loss_tokens: Tensor | None = None,
    ) -> None:
        """Take one step's sums into the means.

        ``price`` follows from the Gauss-Newton matrix. With ``L = (1/N) Σ_n ℓ_n`` a change Δh_t of the site's
        h at each of T tokens changes L by ``(1/2N) Σ_t Δh_tᵀ F_t Δh_t`` to second order, with F_t the Fisher
        matrix of ``Σ_n ℓ_n`` at token t. What arrives there is ``δ_t = (1/N) Σ_n ∂ℓ_n/∂h_t``, so ``F_t ≈ N²
        E[δ δᵀ]``, and for ``Δh = −(I − P) h`` the sum is ``½·N·T·tr((I − P)ᵀ Σ_g (I − P) Σ_a)``. Correlations
        between tokens, and between sites, are left out.

        Args:
            sums: the step's sums over tokens.
            accept: boolean scalar; where false nothing changes.
            decay: weight that the past keeps per step, or None for the running mean over all tokens.
            gradient_unit: what one unit of Σ_g is to be in this step, a positive scalar.
            loss_tokens: N, the tokens that the step's loss is a mean over; by default as many as reach the
                site.
        """
        seen = (sums.rows > 0) & accept
        count = sums.rows.clamp_min(1)
        kept, added = (1.0, sums.rows) if decay is None else (decay, torch.ones_like(sums.rows))
        price = 0.5 * (sums.tokens if loss_tokens is None else loss_tokens) * sums.tokens * gradient_unit
        weight = kept * self.gradient_weight
        mean_price = (weight * self.price + added * price) / (weight + added).clamp_min(
            torch.finfo(price.dtype).tiny
        )
        self.price = torch.where(seen, mean_price, self.price)
        for side, total in (("activation", sums.activation), ("gradient", sums.gradient / gradient_unit)):
            mean, weight, samples = (getattr(self, side + end) for end in ("", "_weight", "_samples"))
            old_weight = kept * weight
            new_weight = old_weight + added
            updated = (
                old_weight[:, None, None] * mean + (added / count)[:, None, None] * total
            ) / new_weight.clamp_min(torch.finfo(weight.dtype).tiny)[:, None, None]
            setattr(self, side, torch.where(seen[:, None, None], updated, mean))
            setattr(self, side + "_weight", torch.where(seen, new_weight, weight))
            setattr(self, side + "_samples", torch.where(seen, samples + sums.rows, samples))

    def change_coordinates(self, a_weight: Tensor, b_weight: Tensor) -> None:
        """The factors after ``A ← M A``, ``B ← B N``: ``M Σ_a Mᵀ`` and ``Nᵀ Σ_g N``, since h ← M h and δ ← Nᵀ δ.

        Args:
            a_weight: M ``[S, r, r]``.
            b_weight: N ``[S, r, r]``.
        """
        activation = a_weight @ self.activation.to(a_weight.dtype) @ a_weight.mT
        gradient = b_weight.mT @ self.gradient.to(b_weight.dtype) @ b_weight
        self.activation, self.gradient = (
            linalg.symmetric(activation).float(),
            linalg.symmetric(gradient).float(),
        )


def loss_tokens(steps: Sequence[Sums]) -> Tensor:
    """How many tokens a step's loss is a mean over, as far as the taps can tell: a scalar on the first bucket's device.

    It is the least number of tokens with δ ≠ 0 over all sites that saw any. In a transformer whose last block
    is adapted that is exact: behind its attention only the tokens that are scored have a gradient. Elsewhere
    it is too large, and too small where experts share the tokens out. That is a common factor of all
    predicted losses; their order does not depend on it.
    """
    device = steps[0].rows.device
    fewest = [torch.where(s.tokens > 0, s.tokens, torch.inf).amin().to(device) for s in steps]
    least = torch.stack(fewest).amin()
    return torch.where(least.isfinite(), least, torch.zeros_like(least))


def gradient_unit(steps: Sequence[Sums], ranks: Sequence[Tensor] | None = None) -> Tensor:
    """Mean over all sites that saw tokens of ``tr(Σ_g)/r`` in this step, a positive scalar on the first bucket's device.

    The loss's δ carry 1/N, N the number of target tokens of the batch, and the loss scale of fp16; both are
    common to all sites, so one common unit takes them out and leaves the sites' relative sizes alone.

    Args:
        steps: the step's sums, one entry per bucket.
        ranks: coordinates in use of each bucket's sites ``[S]``, in the place of r; by default all.
    """
    device = steps[0].rows.device
    in_use = ranks if ranks is not None else [None] * len(steps)
    means = [linalg.mean_eigenvalue(s.gradient, rank) for s, rank in zip(steps, in_use, strict=True)]
    totals = [(mean / s.rows.clamp_min(1)).sum().to(device) for mean, s in zip(means, steps, strict=True)]
    seen = [(s.rows > 0).sum().to(device) for s in steps]
    unit = reduce(torch.add, totals) / reduce(torch.add, seen).clamp_min(1)
    return torch.where(torch.isfinite(unit) & (unit > 0), unit, torch.ones_like(unit))
