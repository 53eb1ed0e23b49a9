"""Kernels that a piece of work launches: by PyTorch's profiler; on a CPU the operations that compute."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .counting import Counter, LiveBytes

_ACTIVITY = torch.profiler.ProfilerActivity
_STAGE = "grit::"  # what GRIT's telemetry puts before a stage's name
_LAUNCHED = ("kernel", "gpu_memcpy", "gpu_memset")  # the profiler's categories of what runs on the device


def profiled(
    work: Callable[[], Any], device: str, with_stages: bool = True
) -> tuple[dict[str, int], dict[str, float]]:
    """Kernels, copies and fills, and the seconds of GRIT's stages; on a CPU ``{"operations": n}`` and none.

    For the stages the profiler has to watch the host too, which takes seconds for a large model's pass.
    """
    if not device.startswith("cuda"):
        with Counter("cpu") as counter:
            work()
        return {"operations": counter.total().calls}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace(work, path, [*([_ACTIVITY.CPU] if with_stages else []), _ACTIVITY.CUDA])
        found = json.loads(path.read_text(encoding="utf-8"))
    return counted(found), device_seconds(found)


def counted(found: dict[str, Any]) -> dict[str, int]:
    """How many events of each kind a profiler's trace holds that ran on the device."""
    kinds = [event.get("cat") for event in found["traceEvents"]]
    return {kind.removeprefix("gpu_"): kinds.count(kind) for kind in _LAUNCHED}


def device_seconds(found: dict[str, Any]) -> dict[str, float]:
    """Seconds from the first to the last kernel of each of GRIT's stages, from a profiler's trace (in µs)."""
    total: dict[str, float] = {}
    for event in found["traceEvents"]:
        name = str(event.get("name", ""))
        if event.get("cat") == "gpu_user_annotation" and name.startswith(_STAGE):
            stage = name.removeprefix(_STAGE)
            total[stage] = total.get(stage, 0.0) + event.get("dur", 0) / 1e6
    return total


def trace(
    work: Callable[[], Any], path: Path, activities: list[torch.profiler.ProfilerActivity] | None = None
) -> None:
    """Write a Chrome trace of the work (chrome://tracing, Perfetto); ``.json.gz`` packs it.

    Without `activities` the trace holds all that there are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))


class PeakMemory:
    """The peak bytes of tensors inside its ``with`` statement, beyond those alive at its start.

    On a GPU as its allocator counts them; on a CPU as far as they were made inside.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._live = None if self._cuda else LiveBytes(device)
        self._start = 0
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._live is None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is None:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._live.__exit__(*error)
            self.bytes = self._live.peak
