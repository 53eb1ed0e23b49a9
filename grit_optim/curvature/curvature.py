"""The Fisher information of all sites: each step's statistics go from here to the buckets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grit_optim.capture.capture import Statistics
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.curvature.moments import mean_square
from grit_optim.curvature.units import gradient_unit, loss_tokens
from grit_optim.lora.kept_ranks import KeptRanks
from grit_optim.options import CurvatureOptions
from grit_optim.profiling import StageTimes


class Curvature:
    """The curvature of all buckets.

    Attributes:
        buckets: the curvature of each bucket.
        folds: number of steps whose statistics were offered to the factors.
        dropped_folds: number of those whose statistics were not finite and so left out, on the device.
    """

    def __init__(self, options: CurvatureOptions, times: StageTimes) -> None:
        self.buckets: list[BucketCurvature] = []
        self.folds = 0
        self.dropped_folds: Tensor | int = 0
        self._options = options
        self._times = times

    def attach(self, ranks: Sequence[KeptRanks]) -> None:
        """Start anew, with no statistics, for the buckets of ``ranks``."""
        self.buckets = [BucketCurvature(kept.bucket, kept, self._options) for kept in ranks]

    @property
    def device(self) -> torch.device | None:
        """The device of the first bucket; None without buckets."""
        return self.buckets[0].bucket.device if self.buckets else None

    @property
    def kind(self) -> str:
        """The option ``fisher``."""
        return self._options.fisher

    @property
    def gradient_moments_in_operators(self) -> bool:
        """Whether moments of gradients are expressed in the operators, so that a checkpoint needs those."""
        return in_operators(self.kind)

    def scale_damping(self, scale: float) -> None:
        """Set the factor of the adaptive schedule on ``kfac_damping``."""
        for curvature in self.buckets:
            curvature.scale_damping(scale)

    def fold(self, statistics: Statistics) -> None:
        """Fold one step's statistics into the factors and, where ``fisher`` needs them, the moments.

        If a sum or a gradient is not finite nothing changes, and ``dropped_folds`` counts the step.
        """
        if statistics.changed:
            for curvature in self.buckets:  # what the taps saw, in another unit, or only in part
                curvature.forget_named(statistics.changed)
        if not statistics.recorded:
            return
        with self._times("fold"):
            sums, device = statistics.sums, self.buckets[0].bucket.device
            accept = torch.stack([s.is_finite().to(device) for s in sums]).all()
            relative = self._options.damping == "relative"
            in_use = [curvature.ranks.in_use for curvature in self.buckets]
            unit = (
                gradient_unit(sums, in_use)
                if relative
                else torch.ones((), dtype=torch.float32, device=device)
            )
            moment_unit, scored = (
                self._moment_unit(device, relative),
                loss_tokens(sums, statistics.by_gradients),
            )
            if moment_unit is not None:
                accept = accept & moment_unit.isfinite()
            of_gradients = statistics.by_gradients
            for curvature, total, flags in zip(self.buckets, sums, of_gradients, strict=True):
                there = curvature.bucket.device
                square_unit = moment_unit if moment_unit is None else moment_unit.to(there)
                curvature.fold(total, accept.to(there), unit.to(there), scored.to(there), square_unit, flags)
            self.folds += 1
            self.dropped_folds = self.dropped_folds + (~accept).long()

    def _moment_unit(self, device: torch.device, relative: bool) -> Tensor | None:
        """The unit of this step's squared gradients, not finite if a gradient is not. None without moments.

        The unit is a scalar on ``device``.
        """
        if self.kind == "kfac":
            return None
        groups = [
            part
            for curvature in self.buckets
            for group in curvature.bucket.groups
            if (part := group.with_gradient())
        ]
        return mean_square(groups, device, relative)


def in_operators(fisher: str) -> bool:
    """Whether this approximation keeps moments of gradients in the coordinates of the operators."""
    return fisher == "ekfac"
