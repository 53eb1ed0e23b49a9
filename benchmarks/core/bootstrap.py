"""Where losses over budgets cross a target, and a paired bootstrap of the crossing over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED, COVERAGE = 2000, 0, 0.95


def crossing(budgets: Sequence[int], losses: Sequence[float], target: float) -> float:
    """The shortest budget from which on every measured one reaches `target`, interpolated on straight lines.

    Infinite where the longest one misses it; the shortest measured one where all reach it.
    """
    if losses[-1] > target:
        return math.inf
    for place in range(len(losses) - 2, -1, -1):
        above, below = losses[place], losses[place + 1]
        if above > target:
            share = (above - target) / (above - below) if math.isfinite(above) else 1.0
            return budgets[place] + share * (budgets[place + 1] - budgets[place])
    return float(budgets[0])


@dataclass(frozen=True)
class Interval:
    """A percentile interval; an end is infinite where so many resamples did not reach the target."""

    low: float
    high: float


def distribution(statistic: Callable[[Sequence[int]], float], seeds: int) -> np.ndarray:
    """`statistic` of RESAMPLES draws with replacement, each a list of `seeds` places."""
    drawn = np.sort(np.random.default_rng(SEED).integers(seeds, size=(RESAMPLES, seeds)), axis=1)
    distinct, which = np.unique(drawn, axis=0, return_inverse=True)  # few seeds give few different draws
    return np.array([statistic(places) for places in distinct.tolist()])[which.reshape(-1)]


def interval(statistic: Callable[[Sequence[int]], float], seeds: int) -> Interval | None:
    """The middle 95 % of the bootstrap distribution; None for fewer than two seeds."""
    if seeds < 2:
        return None
    values, tail = distribution(statistic, seeds), (1 - COVERAGE) / 2
    # Whole values on both sides: between a number and infinity there is nothing to interpolate.
    low, high = np.quantile(values, tail, method="lower"), np.quantile(values, 1 - tail, method="higher")
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class Measured:
    """What the budgets of one contender on one task gave; losses in nats, infinite for a diverged run."""

    budgets: tuple[int, ...]  # steps, rising
    losses: tuple[tuple[float, ...], ...]  # per budget, one for every seed
    reference: tuple[tuple[float, ...], ...]  # per AdamW contender at the full budget, one for every seed
    full: int  # the full budget in steps

    def ratio(self, places: Sequence[int]) -> float:
        """Interpolated steps to the target over the full budget, both from the seeds at `places` alone."""
        target = min(_mean(losses, places) for losses in self.reference)
        return crossing(self.budgets, [_mean(losses, places) for losses in self.losses], target) / self.full


def _mean(losses: Sequence[float], places: Sequence[int]) -> float:
    return sum(losses[place] for place in places) / len(places)


def mean_ratio(measured: Sequence[Measured], places: Sequence[int]) -> float:
    """The ratio's mean over tasks. Every draw takes the same seeds in all tasks."""
    return sum(one.ratio(places) for one in measured) / len(measured)
