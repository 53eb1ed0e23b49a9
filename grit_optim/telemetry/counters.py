"""Counters, stage times and outcomes that cost nothing until they are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

STAGES = ("capture", "fold", "refresh", "precondition", "base", "reproject", "record")


class StageTimes:
    """Host seconds spent in each stage, also marked as ``grit::stage`` in profiler traces."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with`` statement."""
        # Entering a record_function costs more than a small stage does, so it is left out while nobody
        # profiles.
        named = (
            torch.profiler.record_function(f"grit::{stage}")
            if torch.autograd._profiler_enabled()
            else nullcontext()
        )
        start = time.perf_counter()
        try:
            with named:
                yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the latest step did to m matrices of one side, all ``[m]`` on their device.

    Attributes:
        bucket: position of their bucket.
        side: "A" or "B".
        positions: each one's position in the bucket.
        gradient_norm: ‖∇‖ of the loss.
        without: norm of the update without curvature: the gradient in "inverse", the base's own step in
            "spectral" and "steer"; None in the modes that only know the one with.
        turned: norm of the update with it: Σ⁻¹∇ or the turned step; None where ``without`` is.
        cosine: of the angle between the two; NaN where one is zero, None where ``without`` is.
    """

    bucket: int
    side: str
    positions: tuple[int, ...]
    gradient_norm: Tensor
    without: Tensor | None = None
    turned: Tensor | None = None
    cosine: Tensor | None = None


class Counters:
    """What the optimizer has done, as Python ints and device tensors; a tensor is read only by whoever asks.

    Attributes:
        refreshes: times the operators were derived anew.
        reprojections: times the pairs were reprojected.
        folds: steps whose statistics were offered to the factors.
        dropped: steps of those whose statistics were not finite and were left out, a tensor per device.
        outcomes: what the latest step did, for the modes that hold the gradients.
    """

    def __init__(self) -> None:
        self.refreshes = 0
        self.reprojections = 0
        self.folds = 0
        self.dropped: Tensor | int = 0
        self.outcomes: list[Outcome] = []

    def mean_cosine(self) -> float | None:
        """Mean over all matrices whose update was turned, or None if there was none."""
        cosines = [o.cosine for o in self.outcomes if o.cosine is not None]
        if not cosines:
            return None
        value = float(torch.cat([c.detach().float().cpu().flatten() for c in cosines]).nanmean())
        return None if value != value else value
