"""What a training step costs with each of several optimizers on one shared model, against the first."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.results import finite
from ..core.settings import Settings
from . import kernels
from .lanes import Lane, Shared, allocated, take_turns
from .stages import stage_seconds
from .timing import quartiles

# Untimed steps at a lane's start: allocations, samples for the curvature, GRIT's check of its taps.
WARMUP = 3
BETWEEN = 1  # untimed steps at the start of each block


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Attributes:
        steps: timed steps of each optimizer.
        seconds: time after which no further pair of rounds is begun; None for no limit.
        trace: file for a profiler's trace of each optimizer's step, its name put into it; None for none.
        block: timed steps in a row.
        warmup: untimed steps at a lane's start.
    """

    steps: int
    seconds: float | None = None
    trace: Path | None = None
    block: int = 5
    warmup: int = WARMUP


@dataclass
class Measured:
    """Measurements of one optimizer beside the times in its lane."""

    lane: Lane
    stages: dict[str, float]
    memory: dict[str, int]
    launched: dict[str, dict[str, int]]
    device_seconds: dict[str, float]


@dataclass
class Comparison:
    """The outcome: results by optimizer, and what went wrong with the others."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def _memory(lane: Lane, before: int) -> dict[str, int]:
    """Bytes of the optimizer's state, of weights and optimizer at rest, and at the peak of a step.

    Args:
        lane: warm.
        before: what was allocated before the lane was there; that is the model and what other lanes put
            aside.
    """
    device = lane.shared.workload.device
    state = lane.state_bytes()
    rest = lane.shared.weight_bytes + (allocated(device) - before if device.startswith("cuda") else state)
    with kernels.PeakMemory(device) as peak:
        lane.train_step()
    return {"state_bytes": state, "rest_bytes": rest, "peak_bytes": rest + peak.bytes}


def _launched(lane: Lane) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """What a pass and a step of the optimizer launch, and the device's seconds by stage of that step."""
    shared, device = lane.shared, lane.shared.workload.device
    of_pass, _ = kernels.profiled(lambda: shared.one_pass(0), device, with_stages=False)
    lane.optimizer.zero_grad()
    shared.forward_backward(0)
    of_step, seconds = kernels.profiled(lane.optimizer.step, device)
    lane.optimizer.zero_grad()
    return {"pass": of_pass, "step": of_step}, seconds


def _launched_if_known(lane: Lane) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """Launches and device seconds, or nothing where the machine does not let the profiler look."""
    try:
        return _launched(lane)
    except (RuntimeError, AssertionError, OSError, ValueError) as error:
        print(f"{lane.name}: kernels could not be counted: {type(error).__name__}: {error}", file=sys.stderr)
        lane.optimizer.zero_grad()
        return {}, {}


def _trace(lane: Lane, path: Path) -> None:
    """A trace of one pass and one step, the optimizer's name put into the file's."""

    def work() -> None:
        """One pass and one step of the optimizer."""
        lane.shared.one_pass(0)
        lane.optimizer.step()

    stem, *endings = path.name.split(".")
    target = path.with_name(".".join([f"{stem}-{lane.name}", *(endings or ["json"])]))
    kernels.trace(work, target)
    lane.optimizer.zero_grad()
    print(f"written: {target}")


def _start(shared: Shared, name: str, settings: Settings, plan: Plan) -> Measured:
    """Build a lane, warm it up, look at memory and kernels, and put it aside."""
    before = allocated(shared.workload.device)
    lane = Lane(shared, name, settings)
    try:
        for _ in range(plan.warmup):
            lane.train_step()
        memory = _memory(lane, before)
        launched, seconds = _launched_if_known(lane)
        if plan.trace:
            _trace(lane, plan.trace)
    except BaseException:
        lane.close()
        raise
    lane.forget()
    measured = Measured(lane, stage_seconds(lane.optimizer), memory, launched, seconds)
    lane.pause()
    return measured


def compare(
    shared: Shared, names: Sequence[str], settings: Callable[[str], Settings], plan: Plan
) -> Comparison:
    """Measure every optimizer on the shared model, the first being what the others are compared with.

    An optimizer that fails is named in the outcome, and the others are measured all the same; without the
    first there are no results.
    """
    found: dict[str, Measured] = {}
    outcome = Comparison()

    def failed(name: str, error: Exception) -> None:
        """Keep what went wrong, and free what the optimizer held."""
        outcome.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{name} failed: {outcome.failures[name]}", file=sys.stderr)
        found.pop(name, None)
        shared.clear()
        traceback.clear_frames(error.__traceback__)  # they hold on to what was being made
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    for name in names:
        try:
            found[name] = _start(shared, name, settings(name), plan)
        except Exception as error:  # whatever a package does wrong, or memory that is used up
            failed(name, error)
    lanes = [one.lane for one in found.values()]
    take_turns(
        lanes, plan.steps, plan.block, BETWEEN, plan.seconds, lambda lane, error: failed(lane.name, error)
    )
    for name, one in list(found.items()):
        if not one.lane.step_seconds:
            failed(name, TimeoutError("stopped before a step of it was timed"))
        elif any(finite(loss) is None for loss in one.lane.losses):
            failed(
                name,
                ArithmeticError(
                    "diverged while it was timed, and such times say nothing; choose a lower --lr"
                ),
            )
    if names[0] in found:
        outcome.results = {name: _result(found[names[0]], one) for name, one in found.items()}
    for one in found.values():
        one.lane.go_on()
        one.lane.close()
    return outcome


def _result(reference: Measured, one: Measured) -> dict[str, Any]:
    """One optimizer against the reference, under the names that every cost file has."""
    theirs, mine = reference.lane, one.lane
    count = min(len(theirs.step_seconds), len(mine.step_seconds))
    both = {f"plain {theirs.name}": reference, "optimizer": one}
    taps = [a - b for a, b in zip(mine.pass_seconds, theirs.pass_seconds, strict=False)]
    return {
        "reference": f"plain {theirs.name}",
        "optimizer": mine.name,
        "timed_steps": count,
        "step_seconds": {name: quartiles(m.lane.step_seconds) for name, m in both.items()},
        "pass_seconds": {name: quartiles(m.lane.pass_seconds) for name, m in both.items()},
        "optimizer_seconds": {name: quartiles(m.lane.optimizer_seconds) for name, m in both.items()},
        "taps_seconds": quartiles(taps),
        "ratio": quartiles([a / b for a, b in zip(mine.step_seconds, theirs.step_seconds, strict=False)]),
        "ratio_of_totals": sum(mine.step_seconds[:count]) / sum(theirs.step_seconds[:count]),
        "stage_seconds_per_step": _per_step(one),
        "stage_device_seconds": one.device_seconds,
        "optimizer_state_bytes": {name: m.memory["state_bytes"] for name, m in both.items()},
        "memory": {name: m.memory for name, m in both.items()},
        "launched": {name: m.launched for name, m in both.items()},
    }


def _per_step(one: Measured) -> dict[str, float]:
    """Host seconds per stage and step since the lane was warm, untimed steps between blocks included."""
    steps = len(one.lane.losses)
    return {
        name: (total - one.stages.get(name, 0.0)) / steps
        for name, total in stage_seconds(one.lane.optimizer).items()
    }
