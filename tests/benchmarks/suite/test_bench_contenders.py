"""The suites: their contenders, the choice among these, and sizes that fit together."""

from dataclasses import replace

import pytest

from benchmarks.core.files import BenchmarkError
from benchmarks.suite.contenders import (
    PHASES,
    QUICK_CONTENDERS,
    QUICK_SETTINGS,
    SUITES,
    SuiteSettings,
    check_settings,
    choose,
)
from benchmarks.suite.outlook import expected
from benchmarks.suite.sweep import Ledger, make_trials, plan
from benchmarks.training.optimizers import OPTIMIZERS


def test_the_suite_of_peers():
    labels = [contender.label for contender in SUITES["peers"]]
    assert len(set(labels)) == len(labels)
    assert set(QUICK_CONTENDERS) <= set(labels)
    betas = {(one.beta1, one.beta2) for one in SUITES["peers"] if one.optimizer == "adamw"}
    assert betas == {(0.6, 0.99), (0.8, 0.99), (0.9, 0.99), (0.9, 0.95)}
    assert {one.beta1 for one in SUITES["peers"] if one.optimizer == "grit"} == {0.9}, (
        "as a user's AdamW has it"
    )
    assert {one.options.get("momentum", 0.95) for one in SUITES["peers"] if one.optimizer == "muon"} == {
        0.95,
        0.8,
        0.6,
    }


def test_every_contender_is_a_known_optimizer():
    assert {contender.optimizer for contender in SUITES["peers"]} <= OPTIMIZERS.keys()


def test_contenders_are_chosen_by_label_in_the_suites_order():
    assert [one.label for one in choose("peers", ["grit", "adamw"])] == ["adamw", "grit"]
    assert choose("peers", None) == SUITES["peers"]
    with pytest.raises(BenchmarkError, match="no contender sgdx in suite 'peers'; known: adamw, "):
        choose("peers", ["sgdx"])
    with pytest.raises(BenchmarkError, match="unknown suite 'best'; known: peers"):
        choose("best", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"explore_steps": 101}, "explore_steps 101 is more than the full budget of 100"),
        ({"longest_budget": 0.9}, "do not contain 1"),
        ({"shortest_budget": 1.1}, "do not contain 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(BenchmarkError, match=message):
        check_settings(replace(SuiteSettings(steps=100, explore_steps=50), **change))


def test_the_quick_suite_is_small():
    empty = make_trials(["a", "b"], choose("peers", QUICK_CONTENDERS), QUICK_SETTINGS, Ledger())
    later = expected(empty, PHASES, {})
    steps = sum(run.steps for run in plan(empty, PHASES, {})) + sum(length for _, length in later)
    runs = len(plan(empty, PHASES, {})) + len(later)
    cost = len(QUICK_CONTENDERS) * (2 * (10 + QUICK_SETTINGS.cost_steps) * 0.25 + 10)
    assert (
        steps * 0.25 + runs * 6
    ) / 2 + cost < 25 * 60  # 0.25 s a step, 6 s to load and evaluate, two at a time
