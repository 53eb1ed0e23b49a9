"""The numbers of a suite, computed from its results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..comparison.summary import Result
from ..core.bootstrap import Interval, Measured, interval, mean_ratio
from ..core.results import RunConfig
from ..core.settings import REFERENCE
from .contenders import Contender, cost_name
from .sweep import Search, Trial, reference


@dataclass(frozen=True)
class Standing:
    """One contender on one task: losses in nats, budgets in steps."""

    trial: Trial
    target: float | None
    adamw: tuple[tuple[float, ...], ...]  # per AdamW contender, final loss of every seed at the full budget

    @property
    def label(self) -> str:
        """The contender's label."""
        return self.trial.contender.label

    @property
    def lr(self) -> float | None:
        """The best learning rate; None until it is settled."""
        return None if self.trial.best is None else self.trial.contender.rate(self.trial.best)

    @property
    def runs(self) -> list[Result]:
        """The results at the best rate and the full budget, one for every seed."""
        configs = self.trial.at_budget(self.trial.settings.steps)
        return [self.trial.ledger.results[config.file_name()] for config in configs]

    @property
    def losses(self) -> list[float]:
        """Final losses of :attr:`runs`."""
        return [run["final_loss"] for run in self.runs]

    @property
    def spread(self) -> float | None:
        """Standard deviation of the final loss between seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Final losses less those of AdamW's best at the same seeds, hence the same adapters and batches."""
        if not self.adamw or not self.losses:
            return []
        best = min(self.adamw, key=statistics.fmean)
        return [mine - its for mine, its in zip(self.losses, best, strict=True)]

    @property
    def search(self) -> Search | None:
        """How the search for the shortest budget ended, or how far it has come."""
        return None if self.target is None else self.trial.search(self.target)

    @property
    def steps_ratio(self) -> float | None:
        """The shortest budget that reaches AdamW's best loss, over the full one; infinite where none does."""
        search = self.search
        if search is None or search.missing is not None:
            return None
        return math.inf if search.shortest is None else search.shortest / self.trial.settings.steps

    @cached_property
    def measured(self) -> Measured | None:
        """Losses over budgets, of the budgets that have every seed; None before the best rate is settled."""
        found = {steps: self._losses_at(steps) for steps in self.trial.settings.budgets()}
        whole = {steps: losses for steps, losses in found.items() if losses}
        if not whole or not self.adamw:
            return None
        return Measured(tuple(whole), tuple(whole.values()), self.adamw, self.trial.settings.steps)

    def _losses_at(self, steps: int) -> tuple[float, ...]:
        losses = [self.trial.ledger.loss(config) for config in self.trial.at_budget(steps)]
        return () if None in losses else tuple(loss for loss in losses if loss is not None)

    @property
    def interpolated(self) -> float | None:
        """The ratio on straight lines between the measured budgets."""
        places = range(len(self.trial.settings.seeds))
        return self.measured.ratio(places) if self.measured and self.steps_ratio is not None else None

    @cached_property
    def interval(self) -> Interval | None:
        """The bootstrap interval of the interpolated ratio."""
        measured = self.measured
        if measured is None or self.steps_ratio is None:
            return None
        return interval(measured.ratio, len(self.trial.settings.seeds))

    @property
    def diverged(self) -> list[float]:
        """Learning rates at which a run of the full budget diverged, rising."""
        return sorted({run["config"]["lr"] for run in self.full_runs if run["diverged"]})

    @property
    def full_runs(self) -> list[Result]:
        """All results of this contender at the full budget, whatever the rate."""
        wanted = self.trial.config(0, 0, self.trial.settings.steps)
        return [run for run in self.trial.ledger.results.values() if _same_but_rate(run["config"], wanted)]

    @property
    def remarks(self) -> list[str]:
        """Remarks for the reader: unfinished, not bracketed, diverged or failed runs."""
        trial, found = self.trial, list[str]()
        if failure := trial.failure(self.target):
            found.append(f"failed: {failure.splitlines()[0]}")
        elif phase := trial.needs(self.target)[0]:
            found.append(f"unfinished: {phase}")
        elif trial.best is None:
            found.append("diverged at every rate")
        if trial.settled and trial.settled.edge:
            found.append("not bracketed: best at the end of the rates tried")
        if self.diverged:
            found.append(f"diverged at {', '.join(f'{lr:g}' for lr in self.diverged)}")
        return found


def _same_but_rate(config: Mapping[str, Any], wanted: RunConfig) -> bool:
    """Whether a result's configuration is that of `wanted` at whatever rate and seed."""
    return {**config, "lr": wanted.lr, "seed": wanted.seed} == vars(wanted)


@dataclass(frozen=True)
class Entry:
    """A contender over all tasks; ratios are to AdamW, None while something is missing."""

    contender: Contender
    standings: tuple[Standing, ...]
    cost: Mapping[str, Any] | None
    cost_failure: str | None = None

    @property
    def is_started(self) -> bool:
        """Whether any of its runs has ended, in a result or a failure."""
        return bool(self.cost_failure) or any(
            one.full_runs or len(one.trial.explored.missing) < 3 or one.trial.failure(one.target)
            for one in self.standings
        )

    @property
    def loss(self) -> float | None:
        """Mean over the tasks of the mean final loss; None unless every task has one."""
        losses = [standing.trial.loss for standing in self.standings]
        return None if None in losses else statistics.fmean(loss for loss in losses if loss is not None)

    @property
    def steps_ratio(self) -> float | None:
        """Mean over the tasks; infinite where a task's target is not reached, None while one is missing."""
        ratios = [standing.steps_ratio for standing in self.standings]
        return None if None in ratios else statistics.fmean(ratio for ratio in ratios if ratio is not None)

    @property
    def measured(self) -> list[Measured]:
        """The budgets of every task; empty while one is missing."""
        found = [standing.measured for standing in self.standings if standing.measured]
        return found if self.steps_ratio is not None and len(found) == len(self.standings) else []

    @property
    def interpolated(self) -> float | None:
        """Mean over the tasks of the interpolated ratios."""
        seeds = self.standings[0].trial.settings.seeds
        return mean_ratio(self.measured, range(len(seeds))) if self.measured else None

    @cached_property
    def interval(self) -> Interval | None:
        """The bootstrap interval of :attr:`interpolated`."""
        measured, seeds = self.measured, self.standings[0].trial.settings.seeds
        return interval(lambda places: mean_ratio(measured, places), len(seeds)) if measured else None

    @property
    def at_least(self) -> float | None:
        """A lower bound of the mean where a target is not reached: the longest budget tried stands for it."""
        if self.steps_ratio is None or math.isfinite(self.steps_ratio):
            return None
        sizes = self.standings[0].trial.settings
        longest = sizes.budgets()[-1] / sizes.steps
        return statistics.fmean(min(standing.steps_ratio or 0.0, longest) for standing in self.standings)

    @property
    def step_time(self) -> Mapping[str, float] | None:
        """Quartiles of a step's time over plain AdamW's, both taking turns."""
        return self.cost["ratio"] if self.cost else None

    @property
    def seconds_ratio(self) -> float | None:
        """Steps ratio times the median step-time ratio; infinite where the target is not reached."""
        if self.steps_ratio is None or self.step_time is None:
            return None
        return self.steps_ratio * self.step_time["median"]

    @property
    def state_bytes(self) -> float | None:
        """Bytes of the optimizer's state after a run at the best rate, mean over runs of all tasks."""
        sizes = [run["optimizer_state_bytes"] for standing in self.standings for run in standing.runs]
        return statistics.fmean(sizes) if sizes else None

    @property
    def remarks(self) -> list[str]:
        """Remarks of all tasks; a task is named where they differ."""
        found: dict[str, list[str]] = {}
        for standing in self.standings:
            for remark in standing.remarks:
                found.setdefault(remark, []).append(standing.trial.task)
        everywhere = len(self.standings)
        lines = [
            text if len(tasks) == everywhere else f"{', '.join(tasks)}: {text}"
            for text, tasks in found.items()
        ]
        return lines + ([f"cost failed: {self.cost_failure}"] if self.cost_failure else [])

    @property
    def commits(self) -> int:
        """Number of the project's commits among the runs that the losses come from."""
        return len({(run.get("code") or {}).get("commit") for one in self.standings for run in one.runs})


def _adamw_losses(standings: Sequence[Standing]) -> tuple[tuple[float, ...], ...]:
    """Final losses of every AdamW contender that has a best rate."""
    adamw = [
        one for one in standings if one.trial.contender.optimizer == REFERENCE and one.trial.best is not None
    ]
    return tuple(tuple(one.losses) for one in adamw)


def standings_of(trials: Sequence[Trial], task: str) -> list[Standing]:
    """Every contender on one task."""
    best = reference(trials, task)
    target = best.loss if best else None
    bare = [Standing(trial, target, ()) for trial in trials if trial.task == task]
    adamw = _adamw_losses(bare) if best else ()
    return [Standing(one.trial, target, adamw) for one in bare]


def entries(trials: Sequence[Trial], costs: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """One entry per contender, by rising mean loss; those that lack one come last. `costs` is by label."""
    tasks = list(dict.fromkeys(trial.task for trial in trials))
    standings = [standing for task in tasks for standing in standings_of(trials, task)]
    failures = trials[0].ledger.failures
    made = []
    for contender in {trial.contender.label: trial.contender for trial in trials}.values():
        own = tuple(standing for standing in standings if standing.label == contender.label)
        failed = failures.get(cost_name(tasks[0], contender.label))
        made.append(Entry(contender, own, costs.get(contender.label), failed))
    return sorted(made, key=lambda entry: (entry.loss is None, entry.loss or 0.0, entry.contender.label))
