"""Balanced coordinates of a LoRA pair, in which both of its K-FAC factors are diagonal and equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.base.transport import Move
from grit_optim.curvature.factors import Factors

BALANCING_DAMPING = 1e-4
"""Relative damping of the factors when they are balanced. It is small, so that their spectrum stays true."""


def change_of_coordinates(transform: Tensor, inverse: Tensor, keep: Tensor) -> Move:
    """``A ← T A`` and ``B ← B T⁻¹``, with every coordinate outside ``keep`` set to zero.

    Gradients change with T⁻ᵀ and Tᵀ.

    Args:
        transform: T ``[S, r, r]``.
        inverse: T⁻¹ ``[S, r, r]``.
        keep: mask of the coordinates that stay ``[S, r]``.
    """
    rows, columns = keep[:, :, None], keep[:, None, :]
    return Move(transform * rows, inverse * columns, inverse.mT * rows, transform.mT * columns)


@dataclass(frozen=True)
class Coordinates:
    """The balanced coordinates of a bucket's sites, derived but not applied.

    Attributes:
        transform: T ``[S, r, r]``; the identity on sites that are not ``usable``.
        inverse: T⁻¹ ``[S, r, r]``.
        spectrum: Λ ``[S, r]``, descending, and zero on coordinates that are not in use.
        usable: sites whose factors have enough samples ``[S]``, and for which T is finite.
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
        """The change to these coordinates that keeps the leading ``rank`` ``[S]`` of them."""
        keep = linalg.leading_mask(rank, self.spectrum.shape[-1])
        return change_of_coordinates(self.transform, self.inverse, keep)


def balanced_coordinates(
    factors: Factors, rank: Tensor, ready: tuple[Tensor, Tensor], damping: float
) -> Coordinates:
    """The coordinates in which both factors are Λ. Dropping trailing ones is the optimal reprojection.

    To second order the loss rises in proportion to the sum of the dropped Λ². No projection of h to rank k
    costs less than that of keeping the leading k coordinates (Eckart and Young 1936 on Σ_g^{1/2} Σ_a^{1/2}).

    Args:
        factors: Σ_a and Σ_g.
        rank: rank kept so far ``[S]``; these are the leading coordinates.
        ready: whether each site's Σ_a and Σ_g have enough samples, ``[S]`` each. Other sites keep their
            coordinates.
        damping: added to both factors, relative to their mean eigenvalue, so that T exists.
    """
    mask = linalg.leading_mask(rank, factors.activation.shape[-1])
    activation, gradient = (
        linalg.damped(m.double(), linalg.damping_strength(m.double(), damping, relative=True, rank=rank))
        for m in (factors.activation, factors.gradient)
    )
    transform, inverse, spectrum = linalg.balance(activation, gradient, mask)
    usable = (
        ready[0]
        & ready[1]
        & torch.isfinite(transform).all(-1).all(-1)
        & torch.isfinite(inverse).all(-1).all(-1)
    )
    transform, inverse = (
        torch.where(usable[:, None, None], matrix, linalg.eye_like(matrix)) for matrix in (transform, inverse)
    )
    return Coordinates(transform, inverse, spectrum, usable)
