"""The Fisher information of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grit_optim.capture.capture import Statistics
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.curvature.moments import mean_square
from grit_optim.curvature.units import gradient_unit, loss_tokens
from grit_optim.lora.kept import KeptRanks
from grit_optim.options import FisherOptions
from grit_optim.profiling import StageTimes


class Curvature:
    """The factors of all buckets, and what is derived from them.

    Attributes:
        buckets: one entry per bucket.
        folds: steps whose statistics were offered to the factors.
        dropped_folds: steps of those whose statistics were not finite and were left out, a number on the device.
    """

    def __init__(self, options: FisherOptions, times: StageTimes) -> None:
        self.buckets: list[BucketCurvature] = []
        self.folds = 0
        self.dropped_folds: Tensor | int = 0
        self._options = options
        self._times = times

    def attach(self, ranks: Sequence[KeptRanks]) -> None:
        """Know nothing, of the pairs of these buckets."""
        self.buckets = [BucketCurvature(kept.bucket, kept, self._options) for kept in ranks]

    def forget(self) -> None:
        """Know nothing any more, of the pairs as they are."""
        self.attach([curvature.ranks for curvature in self.buckets])

    @property
    def device(self) -> torch.device | None:
        """Where the first bucket is; None without any."""
        return self.buckets[0].bucket.device if self.buckets else None

    @property
    def kind(self) -> str:
        """The option ``fisher``."""
        return self._options.fisher

    @property
    def moments_in_operators(self) -> bool:
        """Whether the factors' eigenbases are what the moments of the gradients are expressed in."""
        return self.kind == "ekfac"

    def scale_damping(self, scale: float) -> None:
        """Multiply ``kfac_damping`` by this from now on."""
        for curvature in self.buckets:
            curvature.damping_scale = scale

    def fold(self, statistics: Statistics) -> None:
        """Take one step's statistics into the factors and, for the kinds that need them, the gradients' moments.

        Where a sum or a gradient is not finite nothing changes, and the step is counted in ``dropped_folds``.
        """
        if not statistics.recorded:
            return
        with self._times("fold"):
            sums, device = statistics.sums, self.buckets[0].bucket.device
            accept = torch.stack([s.is_finite().to(device) for s in sums]).all()
            relative = self._options.damping == "relative"
            in_use = [curvature.ranks.in_use for curvature in self.buckets]
            unit = gradient_unit(sums, in_use) if relative else torch.ones((), device=device)
            moment_unit, scored = self._moment_unit(device), loss_tokens(sums)
            if moment_unit is not None:
                accept = accept & moment_unit.isfinite()
            for curvature, total in zip(self.buckets, sums, strict=True):
                there = curvature.bucket.device
                square_unit = moment_unit if moment_unit is None else moment_unit.to(there)
                curvature.fold(total, accept.to(there), unit.to(there), scored.to(there), square_unit)
            self.folds += 1
            self.dropped_folds = self.dropped_folds + (~accept).long()

    def _moment_unit(self, device: torch.device) -> Tensor | None:
        """One unit of a squared gradient in this step, not finite if a gradient is not; None without moments."""
        if self.kind == "kfac":
            return None
        groups = [
            part
            for curvature in self.buckets
            for group in curvature.bucket.groups
            if (part := group.with_gradient())
        ]
        return mean_square(groups, device, relative=self._options.damping == "relative")
