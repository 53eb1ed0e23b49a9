"""Changing the LoRA pairs of a bucket together with everything that is expressed in their coordinates."""

from __future__ import annotations

from torch.optim import Optimizer

from grit_optim import reprojection, transport
from grit_optim.curvature import Curvature
from grit_optim.rank import RankPolicy

KEEP_RANK = RankPolicy(fixed=None, threshold=None, floor=1)
"""The policy of a mere change of coordinates."""


def balance(base: Optimizer, curvature: Curvature, policy: RankPolicy, damping: float) -> reprojection.Balanced:
    """Bring the pairs to balanced coordinates and drop the trailing ones as ``policy`` says, for good."""
    change = reprojection.balanced(
        curvature.factors, curvature.rank, policy, curvature.options.kfac_min_samples, damping
    )
    _apply(base, curvature, change.move)
    curvature.factors.change_coordinates(change.move.a_weight, change.move.b_weight)
    curvature.rank = change.rank
    return change


def project(base: Optimizer, curvature: Curvature, policy: RankPolicy) -> None:
    """Project the pairs onto leading eigenvectors of their factors, as the GRIT paper does."""
    options = curvature.options
    move, curvature.rank = reprojection.paper_projection(
        curvature.factors,
        curvature.rank,
        policy,
        options.kfac_min_samples,
        two_sided=options.reprojection == "two_sided",
    )
    _apply(base, curvature, move)


def _apply(base: Optimizer, curvature: Curvature, move: reprojection.Move) -> None:
    transport.move_weights(curvature.bucket.groups, move)
    transport.move_state(base, curvature.bucket.groups, move)
