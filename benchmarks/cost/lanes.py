"""Several optimizers in turns on one model: frozen weights are shared, adapters and hooks are not.

At 8 B two models do not fit beside each other. So there is one; a lane that is not at work keeps the values
of its adapters aside and its hooks off the model.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.settings import Settings, trainable
from ..training.optimizers import make_optimizer, state_bytes
from . import shapes
from .shapes import Workload

if TYPE_CHECKING:
    from peft import PeftModel

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_Hooks = list[tuple[dict[int, Any], dict[int, Any]]]
BATCHES = 4


class Clock:
    """Marks in the stream of work: CUDA events, which do not wait for it, or the host's clock."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._marks: list[Any] = []

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self._cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        """Set a mark after the work that has been given to the device so far."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> list[float]:
        """Seconds between neighbouring marks; forgets them. The device must be done."""
        marks, self._marks = self._marks, []
        pairs = pairwise(marks)
        return [b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairs]


def allocated(device: str) -> int:
    """Bytes that the accelerator's allocator has given out; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


class Shared:
    """The model that the lanes share, its batches, and what its adapters were at the start.

    Attributes:
        weight_bytes: of the model, on a GPU with all that comes with its weights.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        gc.collect()  # an earlier model that is gone refers to itself
        before = allocated(workload.device)
        self.model: PeftModel = shapes.adapted_model(workload)
        weights = [*self.model.parameters(), *self.model.buffers()]
        self.weight_bytes = allocated(workload.device) - before or sum(
            t.numel() * t.element_size() for t in weights
        )
        self.parameters = trainable(self.model)
        self.start = [p.detach().clone() for p in self.parameters]
        self.hooks = self._all_hooks()
        self.batches = shapes.batches(workload, BATCHES)

    def resize(self, workload: Workload) -> None:
        """Go on with batches of another size."""
        self.workload, self.batches = workload, shapes.batches(workload, BATCHES)

    def write(self, values: Iterable[Tensor]) -> None:
        """Set the adapters."""
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], list(values))

    def _all_hooks(self) -> list[tuple[dict[int, Any], frozenset[int]]]:
        """Every module's hook dictionaries, with the keys that are there without an optimizer."""
        modules = self.model.modules()
        return [
            (found, frozenset(found)) for m in modules for n in HOOKS if (found := getattr(m, n)) is not None
        ]

    def take_hooks(self) -> _Hooks:
        """Take off all hooks that optimizers have put on since, and return them."""
        taken = []
        for hooks, own in self.hooks:
            added = {key: hooks[key] for key in hooks if key not in own}
            for key in added:
                del hooks[key]
            if added:
                taken.append((hooks, added))
        return taken

    def one_pass(self, index: int) -> Tensor:
        """Forward and backward over one batch; returns the loss, detached, on the device."""
        tokens = self.batches[index % len(self.batches)]
        with shapes.autocast(self.workload):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        (loss / self.workload.accumulation).backward()
        return loss.detach()

    def forward_backward(self, index: int) -> Tensor:
        """All passes of one step; returns the loss of the last."""
        count = self.workload.accumulation
        return [self.one_pass(index * count + micro) for micro in range(count)][-1]

    def clear(self) -> None:
        """Take what an optimizer left off the model."""
        self.take_hooks()
        for parameter in self.parameters:
            parameter.grad = None


class Lane:
    """One optimizer's training on the shared model.

    Attributes:
        name: the optimizer's name.
        step_seconds: of each whole step: passes, optimizer, clearing of the gradients.
        pass_seconds: of the passes of each step.
        optimizer_seconds: of each ``optimizer.step()``, on a GPU the device's time from the end of the
            passes.
        losses: of each step's last pass.
    """

    def __init__(self, shared: Shared, name: str, settings: Settings) -> None:
        self.shared, self.name = shared, name
        self._clock = Clock(shared.workload.device)
        self._values: list[Tensor] = []
        self._aside: _Hooks = []
        self.forget()
        shared.write(shared.start)
        self.optimizer = make_optimizer(name, shared.model, settings)

    def forget(self) -> None:
        """Drop the times so far."""
        self.step_seconds: list[float] = []
        self.pass_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.losses: list[float] = []

    def train_step(self) -> float:
        """One whole step, timed; returns the loss before it."""
        clock = self._clock
        clock.synchronize()
        begun = time.perf_counter()
        clock.mark()
        loss = self.shared.forward_backward(len(self.step_seconds))
        clock.mark()
        self.optimizer.step()
        clock.mark()
        self.optimizer.zero_grad()
        clock.synchronize()
        self.step_seconds.append(time.perf_counter() - begun)
        passes, step = clock.take()
        self.pass_seconds.append(passes)
        self.optimizer_seconds.append(step)
        self.losses.append(float(loss))
        return self.losses[-1]

    def pause(self) -> None:
        """Leave the model to others."""
        self._values = [p.detach().clone() for p in self.shared.parameters]
        self._aside = self.shared.take_hooks()

    def go_on(self) -> None:
        """Take the model over again."""
        self.shared.write(self._values)
        self._values = []
        for hooks, added in self._aside:
            hooks.update(added)
        self._aside = []

    @contextmanager
    def at_work(self) -> Iterator[Lane]:
        """Have the model to itself for the body of a ``with`` statement."""
        self.go_on()
        try:
            yield self
        finally:
            self.pause()

    def close(self) -> None:
        """End the optimizer and whatever it left on the model."""
        if hasattr(self.optimizer, "close"):
            self.optimizer.close()
        self.shared.clear()

    def state_bytes(self) -> int:
        """Bytes of the tensors in the optimizer's state dict."""
        return state_bytes(self.optimizer.state_dict())


def take_turns(
    lanes: Sequence[Lane],
    steps: int,
    block: int,
    warm: int,
    seconds: float | None,
    failed: Callable[[Lane, Exception], None],
) -> int:
    """Time blocks of steps of every lane in turns; returns how many steps each has.

    Every other round goes backwards, so that a drift of the machine's speed falls on all alike. Ctrl-C ends
    the timing, and what was timed until then counts.

    Args:
        lanes: the lanes, warm and paused.
        steps: timed steps of each.
        block: steps in a row.
        warm: untimed steps before each block, since the caches are the last lane's.
        seconds: stop after the pair of rounds in which this is used up; None for no limit.
        failed: told of a lane that raised; it is left out from then on.
    """
    begun, left, done, rounds = time.perf_counter(), list(lanes), 0, 0
    sizes = [min(block, steps - start) for start in range(0, steps, block)]
    try:
        for turn, size in enumerate(sizes):
            for lane in list(left if turn % 2 == 0 else reversed(left)):
                try:
                    _block(lane, size, warm)
                except (
                    Exception
                ) as error:  # whatever a package does wrong, or memory that is used up; the others go on
                    left.remove(lane)
                    failed(lane, error)
            done, rounds = done + size, rounds + 1
            if seconds is not None and rounds % 2 == 0 and time.perf_counter() - begun > seconds:
                break
    except KeyboardInterrupt:
        print(f"stopped; {done} steps of each were timed", file=sys.stderr)
    return done


def _block(lane: Lane, size: int, warm: int) -> None:
    with lane.at_work():
        kept = [list(times) for times in (lane.step_seconds, lane.pass_seconds, lane.optimizer_seconds)]
        for _ in range(warm):
            lane.train_step()
        lane.step_seconds, lane.pass_seconds, lane.optimizer_seconds = kept
        for _ in range(size):
            lane.train_step()
