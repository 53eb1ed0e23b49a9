"""Which runs a suite needs next, from the results that are there; nothing here trains.

Per task and contender: `explore` searches the learning rate on a short budget, `narrow` settles it at the
full budget with every seed, `budgets` finds the shortest budget that reaches AdamW's best loss. What is on
disk decides, so a stopped suite goes on by being planned again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..core.results import RunConfig
from ..core.settings import REFERENCE
from .contenders import Contender, SuiteSettings


@dataclass(frozen=True)
class Ledger:
    """Results by file name, and what went wrong with the runs that gave none."""

    results: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    def loss(self, config: RunConfig) -> float | None:
        """Final held-out loss in nats; infinite for a diverged run, None for one that is not there."""
        result = self.results.get(config.file_name())
        if result is None:
            return None
        return math.inf if result["diverged"] else result["final_loss"]

    def mean(self, configs: Sequence[RunConfig]) -> float | None:
        """Mean final loss; None while a run is missing, infinite if one diverged."""
        losses = [self.loss(config) for config in configs]
        return None if None in losses else statistics.fmean(loss for loss in losses if loss is not None)


@dataclass(frozen=True)
class Bracket:
    """A search over places of a grid: those looked at, those still to run, and at its end the best one."""

    places: tuple[int, ...]
    missing: tuple[int, ...] = ()
    best: int | None = None  # None too where every place diverged

    @property
    def edge(self) -> bool:
        """Whether the best place is the first or the last of those looked at."""
        return self.best in (self.places[0], self.places[-1])


def bracket(start: int, loss: Callable[[int], float | None], extensions: int) -> Bracket:
    """Search from `start` and its neighbours outwards until the best is neither the first nor the last.

    After `extensions` further places it ends with the best at the edge. Equal losses count for the lower
    place, so a search that only diverges goes down.
    """
    places = [start - 1, start, start + 1]
    while True:
        losses = {place: loss(place) for place in places}
        missing = tuple(place for place in places if losses[place] is None)
        if missing:
            return Bracket(tuple(places), missing)
        found = {place: value for place, value in losses.items() if value is not None}
        best = min(places, key=lambda place: (found[place], place))
        inside = places[0] < best < places[-1]
        if inside or len(places) == 3 + extensions:
            return Bracket(tuple(places), best=best if math.isfinite(found[best]) else None)
        places = [places[0] - 1, *places] if best == places[0] else [*places, places[-1] + 1]


@dataclass(frozen=True)
class Search:
    """A search for the shortest budget: the one to run next, or what was found (steps)."""

    missing: int | None = None
    shortest: int | None = None
    at_limit: bool = (
        False  # the shortest budget of the grid reaches the target: the true one may be shorter still
    )


def shortest_budget(
    budgets: Sequence[int], lowest: int, full: int, reaches: Callable[[int], bool | None]
) -> Search:
    """Bisect rising `budgets` from `lowest` on for one that reaches the target, the one below it not.

    Where the loss falls with the budget that is the shortest one that does. A contender that misses the
    target at the `full` budget is tried at the longest first; one that reaches it at `lowest` goes on below
    it, a budget at a time, until one misses. `reaches` is None where the budget has not been run.
    """
    low, high = budgets.index(lowest) - 1, budgets.index(full)
    if not reaches(full):
        low, high = high, len(budgets) - 1
        if low == high:
            return Search()
        longest = reaches(budgets[high])
        if not longest:
            return Search(missing=budgets[high] if longest is None else None)
    while high - low > 1:
        middle = (low + high) // 2
        answer = reaches(budgets[middle])
        if answer is None:
            return Search(missing=budgets[middle])
        low, high = (low, middle) if answer else (middle, high)
    while high > 0 and budgets[high] <= lowest:
        answer = reaches(budgets[high - 1])
        if answer is None:
            return Search(missing=budgets[high - 1])
        if not answer:
            break
        high -= 1
    return Search(shortest=budgets[high], at_limit=high == 0)


@dataclass(frozen=True)
class Trial:
    """One contender on one task, seen through the results that are there."""

    task: str
    contender: Contender
    settings: SuiteSettings
    ledger: Ledger

    def config(self, place: int, seed: int, steps: int) -> RunConfig:
        """The run at a place of the grid of rates."""
        shared = (
            "batch_size", "rank", "alpha", "weight_decay", "warmup", "device", "precision", "base",
            "adapted_layers",
        )  # fmt: skip
        who, sizes = self.contender, self.settings
        return RunConfig(
            self.task,
            who.optimizer,
            who.rate(place),
            seed,
            steps=steps,
            beta1=who.beta1,
            beta2=who.beta2,
            options=who.options,
            eval_every=sizes.eval_every if steps == sizes.steps else steps,
            **{name: getattr(sizes, name) for name in shared},
        )

    def configs(self, place: int, steps: int) -> list[RunConfig]:
        """The runs at a place of the grid, one for every seed."""
        return [self.config(place, seed, steps) for seed in self.settings.seeds]

    def _first_seed(self, start: int, steps: int) -> Bracket:
        return bracket(start, lambda place: self._first_loss(place, steps), self.settings.extensions)

    @cached_property
    def explored(self) -> Bracket:
        """The grid on the short budget, with the first seed."""
        return self._first_seed(0, self.settings.explore_steps)

    @cached_property
    def narrowed(self) -> Bracket | None:
        """The neighbourhood of the best of :attr:`explored`, at the full budget, with the first seed."""
        start = self.explored.best
        return None if start is None else self._first_seed(start, self.settings.steps)

    @cached_property
    def settled(self) -> Bracket | None:
        """The neighbourhood of the best of :attr:`narrowed`, by the mean over all seeds."""
        start = self.narrowed.best if self.narrowed else None
        return None if start is None else bracket(start, self.mean, self.settings.extensions)

    def mean(self, place: int) -> float | None:
        """Mean final loss over all seeds at the full budget; of a rate far behind, the first seed's loss.

        Seeds shift all rates alike, so a rate that is `margin` behind with one of them would hardly come
        first with more. Where the first seed's loss is below the mean of the rate that is ahead, the other
        seeds are run all the same.
        """
        steps = self.settings.steps
        first = self._first_loss(place, steps)
        best = self.narrowed.best if self.narrowed else None
        if first is not None and best is not None:
            ahead, leader = self._first_loss(best, steps), self.ledger.mean(self.configs(best, steps))
            if (
                ahead is not None
                and first > ahead + self.settings.margin
                and (leader is None or first > leader)
            ):
                return first
        return self.ledger.mean(self.configs(place, steps))

    def _first_loss(self, place: int, steps: int) -> float | None:
        """Final loss of the first seed."""
        return self.ledger.loss(self.config(place, self.settings.seeds[0], steps))

    @property
    def best(self) -> int | None:
        """The place of the best rate at the full budget over all seeds; None until it is settled."""
        return self.settled.best if self.settled else None

    @property
    def loss(self) -> float | None:
        """Mean final loss at the best rate and the full budget."""
        return None if self.best is None else self.mean(self.best)

    def at_budget(self, steps: int) -> list[RunConfig]:
        """The runs at the best rate with another budget, and the schedule shortened with it."""
        return [] if self.best is None else self.configs(self.best, steps)

    def search(self, target: float) -> Search | None:
        """How far the search for the shortest budget has come; None before the best rate is settled."""
        if self.best is None:
            return None

        def reaches(steps: int) -> bool | None:
            """Whether the mean over the seeds is at or below the target."""
            mean = self.ledger.mean(self.at_budget(steps))
            return None if mean is None else mean <= target

        sizes = self.settings
        return shortest_budget(sizes.budgets(), sizes.lowest_budget(), sizes.steps, reaches)

    def _needs_rates(self) -> tuple[str, list[RunConfig]]:
        """The phase that the search for the rate is in, and what it needs."""
        sizes, first = self.settings, self.settings.seeds[0]
        if self.explored.missing:
            return "explore", [
                self.config(place, first, sizes.explore_steps) for place in self.explored.missing
            ]
        if self.narrowed and self.narrowed.missing:
            return "narrow", [self.config(place, first, sizes.steps) for place in self.narrowed.missing]
        if self.settled and self.settled.missing:
            return "narrow", [run for place in self.settled.missing for run in self._next_seeds(place)]
        return "", []

    def _next_seeds(self, place: int) -> list[RunConfig]:
        """The first seed alone while it is missing: its loss decides whether the others are worth running."""
        runs = self.configs(place, self.settings.steps)
        return runs[:1] if self._first_loss(place, self.settings.steps) is None else runs

    def _needs_budget(self, target: float | None) -> list[RunConfig]:
        search = None if target is None else self.search(target)
        return [] if search is None or search.missing is None else self.at_budget(search.missing)

    def needs(self, target: float | None) -> tuple[str, list[RunConfig]]:
        """The phase this trial is in and the runs that it lacks now; "" and none when it is through."""
        phase, runs = self._needs_rates()
        if not phase:
            runs = self._needs_budget(target)
            phase = "budgets" if runs else ""
        return phase, [run for run in runs if self.ledger.loss(run) is None]

    def failure(self, target: float | None) -> str | None:
        """The error of a run that this trial needs to go on; None without one."""
        errors = [self.ledger.failures.get(run.file_name()) for run in self.needs(target)[1]]
        return next((error for error in errors if error), None)

    @property
    def rate_is_open(self) -> bool:
        """Whether runs are still to come that decide the best rate; a failed trial is not open."""
        return bool(self._needs_rates()[0]) and self.failure(None) is None


def make_trials(
    tasks: Sequence[str], contenders: Sequence[Contender], settings: SuiteSettings, ledger: Ledger
) -> list[Trial]:
    """Every contender on every task, tasks outermost."""
    return [Trial(task, contender, settings, ledger) for task in tasks for contender in contenders]


def reference(trials: Sequence[Trial], task: str) -> Trial | None:
    """The AdamW trial with the lowest mean loss; None without any, or while one of them may still change."""
    adamw = [trial for trial in trials if trial.task == task and trial.contender.optimizer == REFERENCE]
    finished = [trial for trial in adamw if trial.loss is not None]
    if not finished or any(trial.rate_is_open for trial in adamw):
        return None
    return min(finished, key=lambda trial: trial.loss or 0.0)


def targets(trials: Sequence[Trial]) -> dict[str, float | None]:
    """By task, the loss to reach: AdamW's best."""
    found = {task: reference(trials, task) for task in dict.fromkeys(trial.task for trial in trials)}
    return {task: trial.loss if trial else None for task, trial in found.items()}


def plan(
    trials: Sequence[Trial], phases: Collection[str], target: Mapping[str, float | None]
) -> list[RunConfig]:
    """The runs that can be started now, each once; none when nothing is left in these phases."""
    runs: dict[str, RunConfig] = {}
    for trial in trials:
        phase, needs = trial.needs(target.get(trial.task))
        if phase in phases and trial.failure(target.get(trial.task)) is None:
            runs |= {run.file_name(): run for run in needs}
    return list(runs.values())
