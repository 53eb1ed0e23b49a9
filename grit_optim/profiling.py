"""Seconds per stage of a step, and copies from a device to the host that nobody waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

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


class HostCopy:
    """Tensors as they are now, by name, in the host's memory as soon as the device has got there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: _started(tensor) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        self._events = []
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return all(event.query() for event in self._events)

    def read(self) -> dict[str, Tensor]:
        """The tensors on the host; waits for what has not arrived."""
        for event in self._events:
            event.synchronize()
        return self._tensors


def _started(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone()
    pinned = tensor.device.type == "cuda"  # only into pinned memory does a copy run beside the host
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return host.copy_(tensor, non_blocking=pinned)
