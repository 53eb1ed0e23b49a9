"""Changing the LoRA pairs of a bucket together with everything that is expressed in their coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim import linalg
from grit_optim.base import transport
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.lora.kept import KeptRanks
from grit_optim.rank.coordinates import Coordinates, balanced_coordinates
from grit_optim.rank.projections import paper_projection
from grit_optim.rank.selection import RankPolicy

_START_NORM = 3**-0.5
"""Norm of a row of A as PEFT draws it: entries uniform in ±1/√d_in."""


def coordinates(curvature: BucketCurvature, damping: float) -> Coordinates:
    """The pairs' balanced coordinates, in the order of the bucket; nothing is changed."""
    return balanced_coordinates(curvature.factors, curvature.ranks.in_use, curvature.factors_ready(), damping)


def balance(base: Optimizer, curvature: BucketCurvature, damping: float) -> None:
    """Bring the pairs to balanced coordinates, all of them kept."""
    truncate(base, curvature, coordinates(curvature, damping), curvature.ranks.rank)


def predicted_loss(curvature: BucketCurvature, found: Coordinates, rank: Tensor) -> Tensor:
    """Rise of the loss that keeping ``rank`` ``[S]`` of the balanced coordinates is predicted to cost: ``[S]``."""
    size = curvature.bucket.rank
    gone = linalg.leading_mask(curvature.ranks.rank, size) & ~linalg.leading_mask(rank, size)
    return curvature.factors.price * (found.energy * gone).sum(-1).float()


def truncate(base: Optimizer, curvature: BucketCurvature, found: Coordinates, rank: Tensor) -> None:
    """Take the balanced coordinates, drop those beyond ``rank`` ``[S]``, and add what that costs to ``ranks.dropped``."""
    ranks = curvature.ranks
    kept = torch.minimum(rank, ranks.rank)
    ranks.dropped = ranks.dropped + torch.where(found.usable, predicted_loss(curvature, found, kept), 0.0)
    move = found.move(kept)
    _apply(base, curvature, move)
    curvature.factors.change_coordinates(move.a_weight, move.b_weight)
    ranks.rank = kept


def regrow(base: Optimizer, curvature: BucketCurvature, rank: Tensor, seed: int) -> None:
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
    fresh = linalg.leading_mask(rank, size) & ~linalg.leading_mask(curvature.ranks.rank, size)
    generator = torch.Generator(curvature.bucket.device).manual_seed(seed)
    for group in curvature.bucket.groups:
        if group.side == "A":
            old = group.stack(group.parameters)
            rows = torch.randn(old.shape, generator=generator, device=old.device)
            norm = _typical_row_norm(old, curvature.ranks.rank[group.index])
            rows = rows * (norm / torch.linalg.vector_norm(rows, dim=-1, keepdim=True))
            transport.set_weights(base, group, torch.where(fresh[group.index][..., None], rows, old), fresh)
    curvature.ranks.rank = torch.maximum(rank, curvature.ranks.rank)


def _typical_row_norm(stacked: Tensor, rank: Tensor) -> Tensor:
    """Root mean square norm of the leading ``rank`` ``[m]`` rows of ``[m, r, d]``, or that of a new A where there is none."""
    total = stacked.square().sum((1, 2)) / rank.clamp_min(1)
    return torch.where(total > 0, total.sqrt(), _START_NORM)[:, None, None]


def settle_ranks(curvatures: Sequence[BucketCurvature]) -> None:
    """Let the ranks be what A and B use: all coordinates up to the last that is not zero in both.

    The optimizer leaves them so itself; weights that were loaded since, from another checkpoint or without
    the optimizer's state, may use more or less. Where they use more, the factors describe other coordinates
    than theirs, and start anew. The paper's projections give no coordinate up, so the weights say nothing of
    their ranks.
    """
    for curvature in curvatures:
        if curvature.ranks.given_up:
            _settle(curvature, curvature.ranks)


def _settle(curvature: BucketCurvature, ranks: KeptRanks) -> None:
    used = torch.zeros_like(ranks.mask)
    for group in curvature.bucket.groups:
        there = (group.stack(group.parameters) != 0).any(3 - group.rank_dim)
        used[group.index] = used[group.index] | there
    position = torch.arange(1, curvature.bucket.rank + 1, device=used.device)
    rank = (used * position).amax(-1)
    regained = rank > ranks.rank
    curvature.factors.forget(regained)
    ranks.dropped = torch.where(regained & (rank == curvature.bucket.rank), 0.0, ranks.dropped)
    ranks.rank = rank


def clear_given_up(curvature: BucketCurvature) -> None:
    """Set what was given up to zero once more, whatever the base made of it.

    Gradients and moments of a dropped coordinate are zero, and no elementwise optimizer moves it. One that
    adds noise, or keeps state that could not be moved along, might.
    """
    for group in curvature.bucket.groups:
        group.write(group.masked(group.stack(group.parameters), curvature.ranks.mask))


def project(base: Optimizer, curvature: BucketCurvature, policy: RankPolicy, two_sided: bool) -> None:
    """Project the pairs onto leading eigenvectors of their factors, as the GRIT paper does."""
    ranks = curvature.ranks
    move, ranks.rank = paper_projection(
        curvature.factors, ranks.rank, policy, curvature.factors_ready(), two_sided
    )
    _apply(base, curvature, move)


def _apply(base: Optimizer, curvature: BucketCurvature, move: transport.Move) -> None:
    transport.move_weights(curvature.bucket.groups, move)
    # K-FAC's factor of each gradient, whatever `pairing` is.
    covariances = curvature.factors.gradient, curvature.factors.activation
    transport.move_state(base, curvature.bucket.groups, move, covariances)
