"""Crossings and the paired bootstrap, on data whose answer is known."""

import math

import numpy as np
import pytest

from benchmarks.core.bootstrap import Interval, Measured, crossing, distribution, interval, mean_ratio


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.0, 3.0, 2.0], 70.0),  # 2.6 lies 40 % of the way from 60 to 80 ... and so on below
        ([4.0, 2.6, 2.0], 60.0),
        ([2.5, 2.4, 2.0], 40.0),  # all reach it: the shortest that was measured
        ([4.0, 3.0, 2.7], math.inf),
        ([2.0, 3.0, 2.0], 70.0),  # an early stroke of luck does not count while a longer budget misses
        ([math.inf, math.inf, 2.0], 80.0),  # a diverged budget says nothing about the way to the next
    ],
)
def test_crossing_on_straight_lines(losses, expected):
    target = 2.5 if expected == 70.0 else 2.6
    assert crossing([40, 60, 80], losses, target) == pytest.approx(expected)


def measured(shifts, reference_shifts=None, gain=20):
    """A contender that is `gain` steps ahead of AdamW; every seed shifts all its losses."""
    reference_shifts = shifts if reference_shifts is None else reference_shifts
    budgets = (60, 70, 85, 100)
    losses = tuple(tuple(3.0 - 0.01 * (steps + gain) + shift for shift in shifts) for steps in budgets)
    return Measured(budgets, losses, (tuple(2.0 + shift for shift in reference_shifts),), 100)


def test_shifts_that_both_share_cancel():
    one = measured([0.0, 0.3, -0.2])
    found = interval(one.ratio, 3)
    assert (found.low, found.high) == pytest.approx((0.8, 0.8))
    assert one.ratio([0, 1, 2]) == pytest.approx(0.8)


def test_shifts_of_the_contender_alone_widen_the_interval_around_the_truth():
    found = interval(measured([0.05, -0.05, 0.0], [0.0, 0.0, 0.0]).ratio, 3)
    assert (found.low, found.high) == pytest.approx((0.75, 0.85))
    wide, narrow = (
        interval(measured(list(scale * np.linspace(-1, 1, 12)), [0.0] * 12).ratio, 12)
        for scale in (0.05, 0.01)
    )
    assert wide.low < narrow.low < 0.8 < narrow.high < wide.high


def test_the_target_is_taken_anew_from_the_same_seeds_and_over_all_of_adamw():
    one = Measured((100,), ((1.9, 2.9),), ((2.0, 2.0), (3.0, 1.0)), 100)
    assert one.ratio([0]) == 1.0  # 1.9 against min(2, 3)
    assert one.ratio([1]) == math.inf  # 2.9 against min(2, 1)
    assert one.ratio([0, 0]) == 1.0


def test_too_few_seeds_give_no_interval():
    assert interval(measured([0.0]).ratio, 1) is None


def test_resamples_that_miss_the_target_open_the_interval():
    found = interval(measured([0.0, 0.0, 0.6], [0.0, 0.0, 0.0]).ratio, 3)
    assert found == Interval(pytest.approx(0.8), math.inf)


def test_draws_are_fixed_and_fair():
    first, second = (distribution(lambda places: sum(places) / 3, 3) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (2000,)
    assert first.mean() == pytest.approx(1.0, abs=0.04)  # standard error √(2/3 / 3 / 2000) = 0.011
    assert first.var() == pytest.approx(2 / 9, rel=0.1)
    assert set(np.round(first * 3).astype(int)) == set(range(7))


def test_tasks_draw_the_same_seeds():
    """Opposite shifts of a seed in two tasks cancel in the mean only if both draw that seed together."""
    tasks = [measured([0.05, -0.05, 0.0], [0.0] * 3), measured([-0.05, 0.05, 0.0], [0.0] * 3)]
    found = interval(lambda places: mean_ratio(tasks, places), 3)
    assert (found.low, found.high) == pytest.approx((0.8, 0.8))
