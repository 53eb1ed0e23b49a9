"""Fisher-guided reprojection of a LoRA pair, as four operators on the rank side.

Every way to reproject is a :class:`Move`: A is multiplied from the left and B from the right by r×r matrices,
and what transforms like a gradient (the base optimizer's moments) by two others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.curvature.factors import Factors
from grit_optim.rank.selection import RankPolicy


@dataclass(frozen=True)
class Move:
    """``A ← a_weight A``, ``B ← B b_weight``; gradients ``∇A ← a_gradient ∇A``, ``∇B ← ∇B b_gradient``; all ``[S, r, r]``."""

    a_weight: Tensor
    b_weight: Tensor
    a_gradient: Tensor
    b_gradient: Tensor


def change_of_coordinates(transform: Tensor, inverse: Tensor, keep: Tensor) -> Move:
    """``A ← T A``, ``B ← B T⁻¹`` and the gradients with T⁻ᵀ and Tᵀ, then every coordinate outside ``keep`` set to zero.

    Args:
        transform: T ``[S, r, r]``.
        inverse: T⁻¹ ``[S, r, r]``.
        keep: mask of the coordinates that stay ``[S, r]``.
    """
    rows, columns = keep[:, :, None], keep[:, None, :]
    return Move(transform * rows, inverse * columns, inverse.mT * rows, transform.mT * columns)


@dataclass(frozen=True)
class Coordinates:
    """Balanced coordinates of the sites of a bucket, not yet taken.

    Attributes:
        transform: T ``[S, r, r]``, the identity where nothing could be derived.
        inverse: T⁻¹ ``[S, r, r]``.
        spectrum: Λ ``[S, r]``, descending and zero on coordinates that are not in use.
        usable: sites whose factors have enough samples ``[S]``.
    """

    transform: Tensor
    inverse: Tensor
    spectrum: Tensor
    usable: Tensor

    @property
    def energy(self) -> Tensor:
        """Λ² ``[S, r]``: what dropping each coordinate adds to ``tr((I−P)ᵀ Σ_g (I−P) Σ_a)``."""
        return self.spectrum.square()

    def move(self, rank: Tensor) -> Move:
        """The change to these coordinates, of which the leading ``rank`` ``[S]`` stay."""
        keep = linalg.leading_mask(rank, self.spectrum.shape[-1])
        return change_of_coordinates(self.transform, self.inverse, keep)


def balanced_coordinates(factors: Factors, rank: Tensor, min_samples: int, damping: float) -> Coordinates:
    """The coordinates in which both factors are Λ, and in which dropping the trailing ones is the optimal reprojection.

    The second-order loss change of keeping the leading k coordinates is proportional to the sum of the
    dropped Λ², the least that any rank-k projection of h can cost (Eckart and Young 1936 on Σ_g^{1/2}
    Σ_a^{1/2}).

    Args:
        factors: Σ_a and Σ_g.
        rank: rank kept so far ``[S]``; those are the leading coordinates.
        min_samples: tokens below which a site is left as it is.
        damping: added to both factors, relative to their mean eigenvalue, so that T exists.
    """
    mask = linalg.leading_mask(rank, factors.activation.shape[-1])
    activation, gradient = (
        linalg.damped(m.double(), linalg.damping_strength(m.double(), damping, relative=True, rank=rank))
        for m in (factors.activation, factors.gradient)
    )
    transform, inverse, spectrum = linalg.balance(activation, gradient, mask)
    ready_a, ready_g = factors.ready(min_samples)
    usable = (
        ready_a
        & ready_g
        & torch.isfinite(transform).all(-1).all(-1)
        & torch.isfinite(inverse).all(-1).all(-1)
    )
    transform, inverse = (
        torch.where(usable[:, None, None], matrix, linalg.eye_like(matrix)) for matrix in (transform, inverse)
    )
    return Coordinates(transform, inverse, spectrum, usable)


def paper_projection(
    factors: Factors, rank: Tensor, policy: RankPolicy, min_samples: int, two_sided: bool
) -> tuple[Move, Tensor]:
    """``A ← V_a V_aᵀ A``, ``B ← B V_g V_gᵀ`` with the top-k eigenvectors of Σ_a and Σ_g (GRIT, arXiv 2601.00231).

    The rank k comes from Σ_a. B is projected with V_a if not ``two_sided``, and while Σ_g has too few
    samples.

    Returns:
        The move, the identity for sites whose Σ_a has fewer than ``min_samples`` tokens, and the rank kept
        ``[S]``.
    """
    ready_a, ready_g = factors.ready(min_samples)
    values, vectors = linalg.descending_eigh(factors.activation)
    new_rank = policy.next_rank(values.clamp_min(0), rank, ready_a)
    keep = linalg.leading_mask(new_rank, vectors.shape[-1])
    onto_a = linalg.projector(vectors, keep)
    onto_b = onto_a
    if two_sided:
        onto_g = linalg.projector(linalg.descending_eigh(factors.gradient)[1], keep)
        onto_b = torch.where(ready_g[:, None, None], onto_g, onto_a)
    # At full rank V Vᵀ is the identity up to rounding; make it exact, so that nothing changes.
    moved = (ready_a & (new_rank < vectors.shape[-1]))[:, None, None]
    onto_a, onto_b = (torch.where(moved, p, linalg.eye_like(p)) for p in (onto_a, onto_b))
    return Move(onto_a, onto_b, onto_a, onto_b), new_rank
