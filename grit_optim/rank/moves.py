"""Changing the coordinates or the rank of LoRA pairs, together with all state that is expressed in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim import linalg
from grit_optim.base import transport
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.rank.coordinates import Coordinates, balanced_coordinates
from grit_optim.rank.projections import paper_projection
from grit_optim.rank.selection import RankPolicy

_START_NORM = 3**-0.5
"""Norm of a row of A as PEFT draws it: entries uniform in ±1/√d_in."""


def coordinates(curvature: BucketCurvature, damping: float) -> Coordinates:
    """The balanced coordinates of the bucket's sites. Nothing is changed."""
    free = ~curvature.bucket.fixed
    activation, gradient = curvature.factors_ready()
    ready = activation & free, gradient & free
    return balanced_coordinates(curvature.factors, curvature.ranks.in_use, ready, damping)


def predicted_loss(curvature: BucketCurvature, found: Coordinates, rank: Tensor) -> Tensor:
    """Predicted rise of the loss, in its unit, where sites keep ``rank`` balanced coordinates: ``[S]``.

    It is infinite where it cannot be predicted, since the factors come from gradients.

    Args:
        curvature: of the bucket.
        found: its balanced coordinates.
        rank: coordinates kept ``[S]``.
    """
    size = curvature.bucket.rank
    gone = linalg.leading_mask(curvature.ranks.rank, size) & ~linalg.leading_mask(rank, size)
    factors = curvature.factors
    unknown = (factors.by_gradients > 0) & gone.any(-1)
    return torch.where(unknown, torch.inf, factors.price * (found.energy * gone).sum(-1).float())


def truncate(base: Optimizer, curvature: BucketCurvature, found: Coordinates, rank: Tensor) -> None:
    """Bring the bucket's sites to balanced coordinates, and drop those beyond ``rank``.

    The predicted cost of those that are dropped is added to ``ranks.dropped``.

    Args:
        base: the base optimizer, whose state moves along.
        curvature: of the bucket.
        found: its balanced coordinates.
        rank: coordinates kept ``[S]``; a site's rank does not rise.
    """
    ranks = curvature.ranks
    kept = torch.minimum(rank, ranks.rank)
    cost = torch.where(found.usable, predicted_loss(curvature, found, kept), 0.0)
    move = found.move(kept)
    _apply(base, curvature, move)
    curvature.change_coordinates(move)
    ranks.keep(kept, cost)


def regrow(base: Optimizer, curvature: BucketCurvature, rank: Tensor, seed: int) -> None:
    """Take further coordinates into use, up to ``rank``, without changing what the sites compute.

    As at LoRA's own start the new columns of B are zero and the new rows of A random. The norm of a new row
    is the root mean square norm of the site's rows in use.

    Args:
        base: the base optimizer, whose state may hold copies of the weights.
        curvature: of the bucket.
        rank: coordinates in use from now on ``[S]``; a site's rank does not fall.
        seed: decides the random rows, so that a resumed run draws equal ones.
    """
    size = curvature.bucket.rank
    fresh = linalg.leading_mask(rank, size) & ~linalg.leading_mask(curvature.ranks.rank, size)
    generator = torch.Generator(curvature.bucket.device).manual_seed(seed)
    for group in curvature.bucket.groups:
        if group.side == "A":
            old = group.stack(group.parameters)
            rows = torch.randn(old.shape, dtype=torch.float32, device=old.device, generator=generator)
            norm = _typical_row_norm(old, curvature.ranks.rank[group.index])
            rows = rows * (norm / torch.linalg.vector_norm(rows, dim=-1, keepdim=True))
            transport.set_weights(base, group, torch.where(fresh[group.index][..., None], rows, old), fresh)
    curvature.ranks.keep(torch.maximum(rank, curvature.ranks.rank))


def _typical_row_norm(stacked: Tensor, rank: Tensor) -> Tensor:
    """Root mean square norm of the leading ``rank`` rows, ``[m, 1, 1]``; that of a new A where they are zero.

    Args:
        stacked: matrices A ``[m, r, d]``.
        rank: rows in use ``[m]``.
    """
    total = stacked.square().sum((1, 2)) / rank.clamp_min(1)
    return torch.where(total > 0, total.sqrt(), _START_NORM)[:, None, None]


def ranks_from_weights(curvatures: Sequence[BucketCurvature]) -> None:
    """Set each rank to what A and B use: all coordinates up to the last at which A or B is not zero.

    The optimizer itself leaves them so. Weights loaded from elsewhere may use more coordinates or fewer.
    Where they use more, the site's factors describe other coordinates, and start anew. Under the paper's
    projections nothing is done: they give no coordinate up, so the weights do not show the ranks.
    """
    for curvature in curvatures:
        if curvature.ranks.given_up:
            curvature.forget(curvature.ranks.settle(_used(curvature)))


def _used(curvature: BucketCurvature) -> Tensor:
    """Coordinates up to the last at which A or B is not zero, ``[S]``."""
    used = torch.zeros_like(curvature.ranks.mask)
    for group in curvature.bucket.groups:
        there = (group.stack(group.parameters) != 0).any(3 - group.rank_dim)
        used[group.index] = used[group.index] | there
    position = torch.arange(1, curvature.bucket.rank + 1, dtype=torch.int64, device=used.device)
    return (used * position).amax(-1)


def clear_given_up(curvature: BucketCurvature) -> None:
    """Set coordinates that were given up to zero again, whatever the base has done to them.

    Their gradients and moments are zero, so no elementwise optimizer moves them. One that adds noise might,
    or one whose state could not be moved along.
    """
    for group in curvature.bucket.groups:
        group.write(group.masked(group.stack(group.parameters), curvature.ranks.mask))


def project(base: Optimizer, curvature: BucketCurvature, policy: RankPolicy, two_sided: bool) -> None:
    """Project the bucket's sites onto leading eigenvectors of their factors, as the GRIT paper does.

    Args:
        base: the base optimizer, whose state moves along.
        curvature: of the bucket.
        policy: which rank each site keeps.
        two_sided: whether B is projected by Σ_g, rather than by Σ_a as A is.
    """
    ready, now = curvature.factors_ready(), curvature.ranks.rank
    move, kept = paper_projection(curvature.factors, now, policy, ready, two_sided)
    _apply(base, curvature, move)
    curvature.ranks.keep(kept)


def _apply(base: Optimizer, curvature: BucketCurvature, move: transport.Move) -> None:
    """Move the weights and the base's state of the bucket's sites."""
    transport.move_weights(curvature.bucket.groups, move)
    # Σ_g describes ∇A over the rank and Σ_a describes ∇B, whatever the option `pairing` says.
    covariances = curvature.factors.gradient, curvature.factors.activation
    transport.move_state(base, curvature.bucket.groups, move, covariances)
    transport.move_copies(base, curvature.bucket.groups, move)
