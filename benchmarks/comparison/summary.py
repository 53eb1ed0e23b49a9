"""Numbers of a comparison, computed from results alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..core.settings import REFERENCE

Result = dict[str, Any]
# What all runs of one table must share, apart from data, hardware and versions.
_SHARED = (
    "task", "base", "adapted_layers", "steps", "batch_size", "rank", "alpha", "warmup", "eval_every",
    "device", "precision",
)  # fmt: skip
# What makes a method besides the optimizer's name; shown in its label where it varies.
_VARIANT = ("beta1", "beta2", "weight_decay", "options")


# Changes times, which a suite does not take from its training runs, and losses by rounding alone, which the
# seeds cover.
_TIMING = frozenset({"hardware jobs", "hardware cpu", "hardware cores", "hardware threads"})


def surroundings(result: Result) -> dict[str, str]:
    """Hardware and versions that a result was made with, as text by name."""
    around = {f"hardware {name}": str(value) for name, value in result["hardware"].items()}
    versions = {f"version of {name}": str(value) for name, value in result["versions"].items()}
    return {**around, **versions}


def loss_surroundings(result: Result) -> dict[str, str]:
    """The part of :func:`surroundings` that losses may depend on by more than rounding."""
    return {name: value for name, value in surroundings(result).items() if name not in _TIMING}


def setting(result: Result) -> dict[str, str]:
    """What must agree for two runs to stand in one table, as text by name."""
    shared = {name: str(result["config"][name]) for name in _SHARED}
    return {"data and model": result["fingerprint"][:16], **shared, **surroundings(result)}


def loss_setting(result: Result) -> dict[str, str]:
    """The part of :func:`setting` that losses may depend on by more than rounding."""
    return {name: value for name, value in setting(result).items() if name not in _TIMING}


def comparable(
    results: Sequence[Result], key: Callable[[Result], dict[str, str]] = setting
) -> list[tuple[dict[str, str], list[Result]]]:
    """Results in groups that may be compared, each with the part of its setting that tells it apart."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[json.dumps(key(result), sort_keys=True)].append(result)
    settings = {key: json.loads(key) for key in sorted(groups)}
    names = {name for one in settings.values() for name in one}
    differing = sorted(name for name in names if len({one.get(name) for one in settings.values()}) > 1)
    return [
        ({name: one.get(name, "none") for name in differing}, groups[key]) for key, one in settings.items()
    ]


T = TypeVar("T")


def sections(groups: Sequence[tuple[dict[str, str], T]]) -> Iterator[tuple[list[str], T, str]]:
    """Every group with the paragraphs above its table and the ending of its figures' names.

    Several groups are headed by what their results differ in.
    """
    for number, (difference, group) in enumerate(groups, start=1):
        above = (
            [f"These runs are not all comparable, so they stand in {len(groups)} tables."]
            if number == 1
            else []
        )
        what = "; ".join(f"{name}: {value}" for name, value in difference.items())
        above = [*above, f"### Table {number}: {what}"] if len(groups) > 1 else []
        yield above, group, f"-{number}" if len(groups) > 1 else ""


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one learning rate, one for each seed."""

    lr: float
    runs: tuple[Result, ...]

    @property
    def finished(self) -> list[Result]:
        """Runs that did not diverge."""
        return [run for run in self.runs if not run["diverged"]]

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return len(self.runs) - len(self.finished)

    @property
    def loss(self) -> float | None:
        """Mean final held-out loss in nats over the finished seeds."""
        return statistics.fmean(run["final_loss"] for run in self.finished) if self.finished else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the final loss between seeds (n - 1); None for fewer than two."""
        losses = [run["final_loss"] for run in self.finished]
        return statistics.stdev(losses) if len(losses) > 1 else None

    def mean(self, key: str) -> float:
        """Mean of a number over the finished seeds."""
        return statistics.fmean(run[key] for run in self.finished)

    @property
    def unseen_loss(self) -> float | None:
        """Mean loss of the training batches when they are first met, from the curve's second point on.

        Within one epoch no example is met twice, so this is a held-out loss on the training packages, of many
        more examples than the held-out split has; every method meets the same batches. None beyond one epoch.
        """
        runs = self.finished
        if not runs or any(run.get("epochs", 2.0) > 1.0 for run in runs):
            return None
        losses = [loss for run in runs for loss in run["train_losses"][run["config"]["eval_every"] :]]
        return statistics.fmean(losses) if losses else None

    def curve(self, key: str) -> list[float]:
        """The held-out curve's `key` (step, seconds or loss), by point the mean over the finished seeds."""
        points = zip(*(run["curve"] for run in self.finished), strict=True)
        return [statistics.fmean(point[key] for point in same_step) for same_step in points]


@dataclass(frozen=True)
class Method:
    """An optimizer with its settings, over its learning rates in rising order."""

    label: str
    optimizer: str
    cells: tuple[Cell, ...]

    @property
    def best(self) -> Cell | None:
        """The cell with the lowest mean loss; one with a diverged seed only where every cell has one."""
        finished = [cell for cell in self.cells if cell.loss is not None]
        whole = [cell for cell in finished if not cell.diverged]
        return min(whole or finished, key=lambda cell: cell.loss or 0.0, default=None)

    @property
    def remark(self) -> str:
        """Why the best learning rate may not be the best one there is; empty where it is bracketed."""
        if len(self.cells) == 1:
            return "single rate"
        return "edge of grid" if self.best in (self.cells[0], self.cells[-1]) else ""


def methods(results: Sequence[Result]) -> list[Method]:
    """Comparable results by method, AdamW first."""
    varying = [name for name in _VARIANT if len({str(result["config"][name]) for result in results}) > 1]
    grouped: dict[tuple[str, str], dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        config = result["config"]
        extra = ", ".join(f"{name}={config[name]}" for name in varying)
        label = f"{config['optimizer']} ({extra})" if extra else config["optimizer"]
        grouped[label, config["optimizer"]][config["lr"]].append(result)
    made = [
        Method(label, optimizer, tuple(Cell(lr, tuple(cells[lr])) for lr in sorted(cells)))
        for (label, optimizer), cells in grouped.items()
    ]
    return sorted(made, key=lambda method: (method.optimizer != REFERENCE, method.label))


def first_crossing(positions: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where a curve first falls to `target`, on straight lines between points; None if it never does."""
    if losses[0] <= target:
        return positions[0]
    for place in range(1, len(losses)):
        if losses[place] <= target:
            share = (losses[place - 1] - target) / (losses[place - 1] - losses[place])
            return positions[place - 1] + share * (positions[place] - positions[place - 1])
    return None


@dataclass(frozen=True)
class Row:
    """A method at its best learning rate; ratios are to AdamW at its own best, None where there is none."""

    method: Method
    best: Cell | None
    steps_ratio: float | None = None
    seconds_ratio: float | None = None
    step_time_ratio: float | None = None


def reference_cell(found: Sequence[Method]) -> Cell | None:
    """AdamW's best cell, over all its settings."""
    cells = [method.best for method in found if method.optimizer == REFERENCE]
    return min((cell for cell in cells if cell is not None), key=lambda cell: cell.loss or 0.0, default=None)


def _reach(cell: Cell, key: str, target: float) -> float | None:
    return first_crossing(cell.curve(key), cell.curve("loss"), target)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def rows(found: Sequence[Method]) -> list[Row]:
    """One row per method: how far it needs to go to AdamW's best final loss, and what a step costs."""
    reference, made = reference_cell(found), list[Row]()
    for method in found:
        best = method.best
        if best is None or reference is None or reference.loss is None:
            made.append(Row(method, best))
            continue
        reach = [
            _ratio(_reach(best, key, reference.loss), _reach(reference, key, reference.loss))
            for key in ("step", "seconds")
        ]
        times = best.mean("step_seconds_median") / reference.mean("step_seconds_median")
        made.append(Row(method, best, reach[0], reach[1], times))
    return made


def described_model(base: str, layers: int | None) -> str:
    """The base model and, where not all are, how many of its layers are adapted."""
    return f"base model {base}" + (f" (its last {layers} layers)" if layers else "")
