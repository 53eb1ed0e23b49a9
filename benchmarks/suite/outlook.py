"""How many runs a suite still needs and how long they will take, from the runs that are there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence

from ..comparison.summary import Result
from ..core.results import RunConfig
from .sweep import Trial

Lengths = list[tuple[str, float]]  # (optimizer, steps) of runs to come


def duration(results: Sequence[Result]) -> Callable[[str, float], float] | None:
    """Seconds of a run by optimizer and steps, from measured medians; None where nothing has been measured.

    The median step of the optimizer (of all, where it has not run yet), and the median of what a run takes
    besides steps.
    """
    timed = [result for result in results if "wall_seconds" in result]
    if not timed:
        return None
    steps: dict[str, list[float]] = {}
    for result in timed:
        steps.setdefault(result["config"]["optimizer"], []).append(result["step_seconds_median"])
    any_step = statistics.median(seconds for group in steps.values() for seconds in group)
    besides = statistics.median(result["wall_seconds"] - result["seconds"] for result in timed)

    def seconds(optimizer: str, count: float) -> float:
        """Wall-clock seconds of one run."""
        return count * (statistics.median(steps[optimizer]) if optimizer in steps else any_step) + besides

    return seconds


def _after(trial: Trial, phase: str) -> Lengths:
    """Runs that usually follow the ones a trial needs now: a guess, since results decide."""
    sizes, who = trial.settings, trial.contender.optimizer
    seeds, short = len(sizes.seeds), [steps for steps in sizes.budgets() if steps <= sizes.steps]
    probes = math.ceil(math.log2(len(short) + 1))
    first = 0 if sizes.explore_steps == sizes.steps else 3
    later: Lengths = []
    if phase == "explore":
        later += [(who, sizes.steps)] * (first + 3 * (seeds - 1))
    elif phase == "narrow" and trial.narrowed and trial.narrowed.missing:
        later += [(who, sizes.steps)] * (3 * (seeds - 1))
    share = 0.5 if phase == "budgets" else 1.0
    later += [(who, statistics.fmean(short))] * round(share * probes * seeds)
    return later


def expected(trials: Sequence[Trial], phases: Collection[str], target: dict[str, float | None]) -> Lengths:
    """Lengths of the runs to be expected after those known now, in the phases that were asked for."""
    later: Lengths = []
    for trial in trials:
        goal = target.get(trial.task)
        phase, _ = trial.needs(goal)
        waits = not phase and trial.best is not None and goal is None
        if (phase or waits) and trial.failure(goal) is None and "budgets" in phases:
            later += _after(trial, phase)
    return later


def _clock(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def outlook(
    trials: Sequence[Trial],
    runs: Sequence[RunConfig],
    phases: Collection[str],
    target: dict[str, float | None],
    jobs: int,
) -> str:
    """One line: the runs known now, those to be expected after them, and the time both will take."""
    later = expected(trials, phases, target)
    results = list(trials[0].ledger.results.values())
    text = f"{len(results)} runs done, {len(runs)} to do now, about {len(later)} more to be expected"
    seconds = duration(results)
    if seconds is None:
        return f"{text}; the time is known once the first runs are done"
    now = sum(seconds(run.optimizer, run.steps) for run in runs) / jobs
    whole = now + sum(seconds(who, steps) for who, steps in later) / jobs
    return f"{text}; about {_clock(now)} for those to do now, {_clock(whole)} for all, with {jobs} at a time"
