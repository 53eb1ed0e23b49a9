"""Changing the LoRA pairs of a bucket together with everything that is expressed in their coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim import linalg
from grit_optim.base import transport
from grit_optim.curvature.bucket import Curvature
from grit_optim.options import PAPER_PROJECTIONS
from grit_optim.rank import coordinates as reprojection
from grit_optim.rank.selection import RankPolicy

KEEP_RANK = RankPolicy(fixed=None, threshold=None, floor=1)
"""The policy of a mere change of coordinates."""

_START_NORM = 3**-0.5
"""Norm of a row of A as PEFT draws it: entries uniform in ±1/√d_in."""


def coordinates(curvature: Curvature, damping: float) -> reprojection.Coordinates:
    """The pairs' balanced coordinates, in the order of the bucket; nothing is changed."""
    in_use = curvature.mask.sum(-1)
    return reprojection.balanced_coordinates(
        curvature.factors, in_use, curvature.options.kfac_min_samples, damping
    )


def balance(base: Optimizer, curvature: Curvature, policy: RankPolicy, damping: float) -> None:
    """Bring the pairs to balanced coordinates and drop the trailing ones as ``policy`` says, for good."""
    found = coordinates(curvature, damping)
    truncate(base, curvature, found, policy.next_rank(found.energy, curvature.rank, found.usable))


def truncate(base: Optimizer, curvature: Curvature, found: reprojection.Coordinates, rank: Tensor) -> None:
    """Take the balanced coordinates, drop those beyond ``rank`` ``[S]``, and add what that costs to ``curvature.dropped``."""
    size = curvature.bucket.rank
    kept = torch.minimum(rank, curvature.rank)
    gone = linalg.leading_mask(curvature.rank, size) & ~linalg.leading_mask(kept, size)
    cost = curvature.factors.price * (found.energy * gone).sum(-1).float()
    curvature.dropped = curvature.dropped + torch.where(found.usable, cost, 0.0)
    move = found.move(kept)
    _apply(base, curvature, move)
    curvature.factors.change_coordinates(move.a_weight, move.b_weight)
    curvature.rank = kept


def regrow(base: Optimizer, curvature: Curvature, rank: Tensor, seed: int) -> None:
    """Take coordinates that are not in use back into use, up to ``rank`` ``[S]``, without changing what the pairs compute.

    As in LoRA's own start the new columns of B are zero and the new rows of A are random; their norm is the
    root mean square of that of the rows that the site has.

    Args:
        base: the base optimizer, for copies of the weights among its state.
        curvature: of the bucket.
        rank: rank from now on ``[S]``, nowhere below the current one.
        seed: decides the rows; the same after a resume.
    """
    size = curvature.bucket.rank
    fresh = linalg.leading_mask(rank, size) & ~linalg.leading_mask(curvature.rank, size)
    generator = torch.Generator(curvature.bucket.device).manual_seed(seed)
    for group in curvature.bucket.groups:
        if group.side == "A":
            old = group.stack(group.parameters)
            rows = torch.randn(old.shape, generator=generator, device=old.device)
            norm = _typical_row_norm(old, curvature.rank[group.index])
            rows = rows * (norm / torch.linalg.vector_norm(rows, dim=-1, keepdim=True))
            transport.set_weights(base, group, torch.where(fresh[group.index][..., None], rows, old), fresh)
    curvature.rank = torch.maximum(rank, curvature.rank)


def _typical_row_norm(stacked: Tensor, rank: Tensor) -> Tensor:
    """Root mean square norm of the leading ``rank`` ``[m]`` rows of ``[m, r, d]``, or that of a new A where there is none."""
    total = stacked.square().sum((1, 2)) / rank.clamp_min(1)
    return torch.where(total > 0, total.sqrt(), _START_NORM)[:, None, None]


def settle_ranks(curvatures: Sequence[Curvature]) -> None:
    """Let the ranks be what A and B use: all coordinates up to the last that is not zero in both.

    The optimizer leaves them so itself; weights that were loaded since, from another checkpoint or without
    the optimizer's state, may use more or less. Where they use more, the factors describe other coordinates
    than theirs, and start anew. The paper's projections give no coordinate up, so the weights say nothing of
    their ranks.
    """
    for curvature in curvatures:
        if curvature.options.reprojection not in PAPER_PROJECTIONS:
            _settle(curvature)


def _settle(curvature: Curvature) -> None:
    used = torch.zeros_like(curvature.mask)
    for group in curvature.bucket.groups:
        there = (group.stack(group.parameters) != 0).any(3 - group.rank_dim)
        used[group.index] = used[group.index] | there
    position = torch.arange(1, curvature.bucket.rank + 1, device=used.device)
    rank = (used * position).amax(-1)
    regained = rank > curvature.rank
    curvature.factors.forget(regained)
    curvature.dropped = torch.where(regained & (rank == curvature.bucket.rank), 0.0, curvature.dropped)
    curvature.rank = rank


def clear_given_up(curvature: Curvature) -> None:
    """Set what was given up to zero once more, whatever the base made of it.

    Gradients and moments of a dropped coordinate are zero, and no elementwise optimizer moves it. One that
    adds noise, or keeps state that could not be moved along, might.
    """
    for group in curvature.bucket.groups:
        group.write(group.masked(group.stack(group.parameters), curvature.mask))


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
    # K-FAC's factor of each gradient, whatever `pairing` is.
    covariances = curvature.factors.gradient, curvature.factors.activation
    transport.move_state(base, curvature.bucket.groups, move, covariances)
