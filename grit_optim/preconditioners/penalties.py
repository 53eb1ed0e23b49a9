"""Penalties on a LoRA pair that come from its curvature, as gradients that need no term in the loss.

With Σ_a, Σ_g and the projectors P_a, P_g onto their leading eigenvectors held constant (GRIT, arXiv
2601.00231):

    curvature     λ_K (tr(Aᵀ Σ_a A) + tr(B Σ_g Bᵀ))         ∇_A = 2 λ_K Σ_a A          ∇_B = 2 λ_K B Σ_g
    reprojection  λ_R (‖(I − P_a) A‖² + ‖B (I − P_g)‖²)     ∇_A = 2 λ_R (I − P_a) A    ∇_B = 2 λ_R B (I − P_g)

Each gradient is one r×r matrix times A or B, so a site's two penalties together cost one product per matrix
and step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.curvature.bucket import Curvature
from grit_optim.lora.buckets import Group
from grit_optim.rank.selection import RankPolicy


def operators(
    activation: Tensor,
    gradient: Tensor,
    onto_a: Tensor,
    onto_g: Tensor,
    lambda_kfac: float,
    lambda_reproj: float,
) -> tuple[Tensor, Tensor]:
    """``2 (λ_K Σ + λ_R (I − P))`` for A and for B, each ``[S, r, r]``.

    Args:
        activation: Σ_a ``[S, r, r]``.
        gradient: Σ_g ``[S, r, r]``.
        onto_a: P_a ``[S, r, r]``.
        onto_g: P_g ``[S, r, r]``.
        lambda_kfac: λ_K.
        lambda_reproj: λ_R.
    """
    eye = linalg.eye_like(activation)
    return (
        2 * (lambda_kfac * activation + lambda_reproj * (eye - onto_a)),
        2 * (lambda_kfac * gradient + lambda_reproj * (eye - onto_g)),
    )


def refresh(curvature: Curvature, policy: RankPolicy) -> None:
    """Derive the penalties' operators from the factors as they are; a factor with too few samples penalises nothing.

    The rank k of both projectors is the one that ``policy`` gives Σ_a now, as in the paper's reprojection.
    """
    options, factors = curvature.options, curvature.factors
    ready_a, ready_g = (ready[:, None, None] for ready in factors.ready(options.kfac_min_samples))
    onto_a = onto_g = linalg.eye_like(factors.activation)
    if options.lambda_reproj:
        onto_a, onto_g = _projectors(curvature, policy, ready_a, ready_g)
    curvature.a_penalty, curvature.b_penalty = operators(
        torch.where(ready_a, factors.activation, 0.0),
        torch.where(ready_g, factors.gradient, 0.0),
        onto_a,
        onto_g,
        options.lambda_kfac,
        options.lambda_reproj,
    )


def _projectors(
    curvature: Curvature, policy: RankPolicy, ready_a: Tensor, ready_g: Tensor
) -> tuple[Tensor, Tensor]:
    """P_a and P_g: the identity until Σ_a has its samples, and P_g = P_a until Σ_g has, as in the paper's reprojection.

    Exactly the identity on coordinates that were given up, so that those stay exactly zero.
    """
    factors, mask = curvature.factors, curvature.mask
    values, basis_a = linalg.leading_eigenbasis(factors.activation, mask)
    rank = policy.next_rank(values, curvature.rank, ready_a[:, 0, 0])
    keep = linalg.leading_mask(rank, values.shape[-1]) | ~mask
    onto_a = torch.where(ready_a, linalg.projector(basis_a, keep), linalg.eye_like(basis_a))
    if curvature.options.reprojection == "one_sided":
        return onto_a, onto_a
    basis_g = linalg.leading_eigenbasis(factors.gradient, mask)[1]
    return onto_a, torch.where(ready_a & ready_g, linalg.projector(basis_g, keep), onto_a)


def gradient(curvature: Curvature, group: Group, share: float) -> Tensor:
    """The penalties' gradient for the matrices of ``group``, ``[m, rows, columns]``.

    Args:
        curvature: of the group's bucket, with operators from :func:`refresh`.
        group: the matrices.
        share: of the full strength, in [0, 1]: the warm-up.
    """
    operator = curvature.a_penalty if group.side == "A" else curvature.b_penalty
    assert operator is not None
    return share * group.apply(operator, group.stack(group.parameters))
