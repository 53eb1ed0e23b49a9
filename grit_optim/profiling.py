"""Seconds spent in each stage of a step, and copies from a device that do not make the host wait."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

STAGES = ("capture", "fold", "refresh", "precondition", "base", "reproject", "record")
"""The stages that are timed, in the order of a step."""


class StageTimes:
    """Host seconds spent in each stage. Profiler traces show the stages too, as ``grit::<stage>``.

    Attributes:
        seconds: stage to seconds, since the optimizer was built.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time that the body of a ``with`` statement takes to ``stage``, one of :data:`STAGES`."""
        # A record_function costs more than a small stage does, so it is entered only while a profiler runs.
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


class HostCopy:
    """Copies of tensors to the host, started now and read later; the host does not wait meanwhile.

    Args:
        tensors: name to tensor. The copies hold what the work queued on the device so far makes of them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: _started(tensor) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        self._events = []
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def arrived(self) -> bool:
        """Whether all copies have arrived, so that :meth:`read` does not wait."""
        return all(event.query() for event in self._events)

    def read(self) -> dict[str, Tensor]:
        """The copies by name. Waits for those that have not arrived."""
        for event in self._events:
            event.synchronize()
        return self._tensors


def _started(tensor: Tensor) -> Tensor:
    """A copy on the host, complete only once the device has reached it."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone()
    pinned = tensor.device.type == "cuda"  # only a copy into pinned memory does not make the host wait
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return host.copy_(tensor, non_blocking=pinned)
