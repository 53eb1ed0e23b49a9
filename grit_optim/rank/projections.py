"""The projections of the GRIT paper: A and B onto the leading eigenvectors of their factors."""

from __future__ import annotations

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.base.transport import Move
from grit_optim.curvature.factors import Factors
from grit_optim.rank.selection import RankPolicy


def paper_projection(
    factors: Factors, rank: Tensor, policy: RankPolicy, ready: tuple[Tensor, Tensor], two_sided: bool
) -> tuple[Move, Tensor]:
    """``A ← V_a V_aᵀ A`` and ``B ← B V_g V_gᵀ``, onto the top k eigenvectors of Σ_a and Σ_g.

    This is the reprojection of GRIT (arXiv 2601.00231). The rank k comes from Σ_a. B is projected with V_a if
    not ``two_sided``, and while Σ_g has too few samples.

    Args:
        factors: Σ_a and Σ_g of a bucket's sites.
        rank: rank kept so far ``[S]``.
        policy: decides k.
        ready: whether each site's Σ_a and Σ_g have enough samples, ``[S]`` each.
        two_sided: whether B is projected with V_g.

    Returns:
        The move, which is the identity for sites whose Σ_a is not ready, and the rank kept ``[S]``.
    """
    ready_a, ready_g = ready
    values, vectors = linalg.descending_eigh(factors.activation)
    new_rank = policy.next_rank(values.clamp_min(0), rank, ready_a)
    keep = linalg.leading_mask(new_rank, vectors.shape[-1])
    onto_a = linalg.projector(vectors, keep)
    onto_b = onto_a
    if two_sided:
        onto_g = linalg.projector(linalg.descending_eigh(factors.gradient)[1], keep)
        onto_b = torch.where(ready_g[:, None, None], onto_g, onto_a)
    # At full rank V Vᵀ is the identity up to rounding. Make it exact, so that nothing changes.
    moved = (ready_a & (new_rank < vectors.shape[-1]))[:, None, None]
    onto_a, onto_b = (torch.where(moved, p, linalg.eye_like(p)) for p in (onto_a, onto_b))
    return Move(onto_a, onto_b, onto_a, onto_b), new_rank
