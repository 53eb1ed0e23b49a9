"""The state of pairs, cut to the directions that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.preconditioners.penalties import Penalties


def narrowed(
    buckets: Sequence[BucketCurvature], known: Mapping[str, dict[str, Tensor]], sizes: Mapping[str, int]
) -> dict[str, dict[str, Tensor]]:
    """The states of some pairs for their leading coordinates alone.

    Args:
        buckets: the curvature of all pairs.
        known: the states by site name.
        sizes: site name to the number of coordinates that stay.
    """
    cut = {}
    for curvature in buckets:
        axes = {**curvature.rank_axes(), **Penalties.rank_axes()}
        for name in curvature.bucket.names():
            if name in sizes:
                state = known[name].items()
                cut[name] = {key: _leading(value, axes.get(key, ()), sizes[name]) for key, value in state}
    return cut


def _leading(value: Tensor, axes: Sequence[int], size: int) -> Tensor:
    for axis in axes:
        value = value.narrow(axis, 0, size)
    return value.clone(memory_format=torch.contiguous_format)
