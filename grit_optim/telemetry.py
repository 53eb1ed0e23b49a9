"""Counters and stage times that cost nothing until they are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

STAGES = ("capture", "fold", "refresh", "precondition", "base", "reproject")


class StageTimes:
    """Host seconds spent in each stage, also marked as ``grit::stage`` in profiler traces."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with`` statement."""
        # Entering a record_function costs more than a small stage does, so it is left out while nobody profiles.
        named = (
            torch.profiler.record_function(f"grit::{stage}") if torch.autograd._profiler_enabled() else nullcontext()
        )
        start = time.perf_counter()
        try:
            with named:
                yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


class Counters:
    """What the optimizer has done, as Python ints and device tensors; a tensor is read only by whoever asks.

    Attributes:
        refreshes: times the operators were derived anew.
        reprojections: times the pairs were reprojected.
        folds: steps whose statistics were offered to the factors.
        dropped: steps of those whose statistics were not finite and were left out, a tensor per device.
        cosines: cosine, per matrix, of the angle between the update with and without curvature, of the latest step.
    """

    def __init__(self) -> None:
        self.refreshes = 0
        self.reprojections = 0
        self.folds = 0
        self.dropped: Tensor | int = 0
        self.cosines: list[Tensor] = []

    def mean_cosine(self) -> float | None:
        """Mean over all matrices whose update was turned, or None if there was none."""
        if not self.cosines:
            return None
        value = float(torch.cat([c.detach().float().cpu().flatten() for c in self.cosines]).nanmean())
        return None if value != value else value
