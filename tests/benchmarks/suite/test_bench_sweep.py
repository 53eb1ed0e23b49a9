"""The planner of a suite, on made-up losses: nothing here trains."""

import math
from dataclasses import asdict, replace

import pytest

from benchmarks.suite.contenders import (
    PHASES,
    Contender,
    SuiteSettings,
)
from benchmarks.suite.outlook import duration, expected, outlook
from benchmarks.suite.sweep import Ledger, bracket, make_trials, plan, shortest_budget, targets

SMALL = SuiteSettings(steps=100, explore_steps=50, eval_every=50, seeds=(0, 1), extensions=3)
ADAMW, OTHER = Contender("adamw", "adamw", lr=0.01), Contender("other", "grit", lr=0.01)


def searched(loss, start=0, extensions=4):
    """The finished search over a known function, and the places in the order in which they were asked for."""
    known, asked = {}, []
    while (found := bracket(start, known.get, extensions)).missing:
        asked += found.missing
        known |= {place: loss(place) for place in found.missing}
    return found, asked


@pytest.mark.parametrize(
    ("best", "places"),
    [
        (0, (-1, 0, 1)),
        (1, (-1, 0, 1, 2)),
        (-1, (-2, -1, 0, 1)),
        (3, (-1, 0, 1, 2, 3, 4)),
        (-3, (-4, -3, -2, -1, 0, 1)),
    ],
)
def test_the_grid_grows_on_the_side_of_the_best_until_that_is_inside(best, places):
    found, asked = searched(lambda place: abs(place - best))
    assert (found.best, found.places, found.edge) == (best, places, False)
    assert sorted(asked) == list(places), "every place once, none beyond what is needed"


@pytest.mark.parametrize("direction", [-1, 1])
def test_a_search_that_never_turns_stops_and_says_that_its_best_is_at_the_edge(direction):
    found, asked = searched(lambda place: -direction * place, extensions=4)
    assert len(asked) == 3 + 4
    assert found.best == direction * 5
    assert found.edge


def test_diverged_counts_as_worse_and_all_diverged_goes_down():
    found, _ = searched(lambda place: math.inf if place > -2 else 1.0 + abs(place + 3))
    assert (found.best, found.edge) == (-3, False)
    nothing, asked = searched(lambda place: math.inf, extensions=2)
    assert nothing.best is None
    assert sorted(asked) == [-3, -2, -1, 0, 1]


BUDGETS = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
LOWEST = 40


def bisected(reaching, full=100):
    """The finished search among budgets of which `reaching` reach the target, and the budgets that it ran."""
    known, run = {full: full in reaching}, []
    while (found := shortest_budget(BUDGETS, LOWEST, full, known.get)).missing is not None:
        assert found.missing not in known, "nothing is asked for twice"
        run.append(found.missing)
        known[found.missing] = found.missing in reaching
    return found, run


@pytest.mark.parametrize("shortest", BUDGETS[:10])
def test_bisection_finds_the_shortest_budget_in_few_runs(shortest):
    found, run = bisected([budget for budget in BUDGETS if budget >= shortest])
    assert (found.shortest, found.at_limit) == (shortest, shortest == 10)
    if shortest > LOWEST:
        assert len(run) <= 3  # of the 6 below the full budget
        assert min(run) >= LOWEST


def test_below_the_lowest_budget_the_search_goes_down_one_at_a_time():
    found, run = bisected([20, 30, 40, 50, 60, 70, 80, 90, 100])
    assert found.shortest == 20
    assert [budget for budget in run if budget < LOWEST] == [30, 20, 10]


def test_noise_gives_a_budget_that_reaches_while_the_one_below_does_not():
    reaching = {50, 80, 100, 110, 120}  # 50 by luck, 90 misses by bad luck
    found, run = bisected(reaching)
    assert found.shortest in reaching
    assert BUDGETS[BUDGETS.index(found.shortest) - 1] not in reaching
    assert len(run) <= 3


def test_who_misses_the_full_budget_is_tried_at_the_longest_first():
    found, run = bisected({110, 120})
    assert (found.shortest, run) == (110, [120, 110])
    assert bisected({120}) == (replace(found, shortest=120), [120, 110])
    never, run = bisected(set())
    assert (never.shortest, run) == (None, [120])


def test_without_longer_budgets_nothing_more_is_run():
    assert shortest_budget([50, 100], 50, 100, {100: False}.get).missing is None


def test_budgets_contain_the_full_one_lie_on_the_grid_and_outlast_the_warm_up():
    assert SuiteSettings().budgets() == [
        3 * place for place in range(2, 21)
    ]  # 5 % of 60 steps are 3, warm-up 5
    assert SuiteSettings().lowest_budget() == 24
    assert SuiteSettings(steps=2).budgets()[0] == 1
    assert 100 in SuiteSettings(steps=100, budget_grid=0.3).budgets()


def simulated(
    losses, contenders=(ADAMW, OTHER), tasks=("naming",), settings=SMALL, phases=PHASES, failing=()
):
    """Plan and "run" by a function of the configuration to the end; returns the trials and all runs."""
    results, failures, everything = {}, {}, []
    while True:
        trials = make_trials(tasks, contenders, settings, Ledger(results, failures))
        runs = plan(trials, phases, targets(trials))
        if not runs:
            return trials, everything
        assert not {run.file_name() for run in runs} & (results.keys() | failures.keys())
        everything += runs
        for run in runs:
            if run.optimizer in failing:
                failures[run.file_name()] = "ValueError: cannot"
                continue
            loss = losses(run)
            results[run.file_name()] = {
                "config": asdict(run), "diverged": loss is None, "final_loss": loss,
                "wall_seconds": 30.0, "seconds": 20.0, "step_seconds_median": 0.2,
            }  # fmt: skip


def valley(run, best=0.01, gain=0.0):
    """A loss with its lowest point at a rate, falling with the budget, a little different for every seed."""
    return 3.0 + abs(math.log2(run.lr / best)) - 0.01 * run.steps + 0.01 * run.seed - gain


def better_by(gain):
    return lambda run: valley(run, gain=gain if run.optimizer == "grit" else 0.0)


def test_phases_in_order_with_the_right_runs():
    trials, runs = simulated(better_by(0.2), contenders=(ADAMW,))
    rates = [0.005, 0.01, 0.02]
    assert [(r.lr, r.seed, r.steps) for r in runs[:7]] == [
        *((lr, 0, 50) for lr in rates),
        *((lr, 0, 100) for lr in rates),
        (0.01, 1, 100),  # its neighbours are a whole nat behind with the first seed
    ]
    assert all(r.lr == 0.01 for r in runs[6:])
    assert {r.seed for r in runs[7:]} == {0, 1}
    assert trials[0].loss == pytest.approx(3.0 - 1.0 + 0.005)


def test_only_rates_near_the_best_get_further_seeds_and_those_seeds_decide():
    """0.02 is 0.02 nats behind with seed 0 and ahead with seed 1; 0.005 is out of the race."""

    def losses(run):
        loss = {0.0025: 9.0, 0.005: 3.5, 0.01: 3.0, 0.02: 3.02, 0.04: 4.0}[run.lr]
        return loss - (0.5 if (run.lr, run.seed) == (0.02, 1) else 0.0)

    trials, runs = simulated(losses, contenders=(ADAMW,))
    assert {r.lr for r in runs if r.seed == 1 and r.steps == 100} == {0.01, 0.02}
    assert trials[0].contender.rate(trials[0].best) == 0.02
    assert trials[0].loss == pytest.approx((3.02 + 2.52) / 2)


def test_a_better_rule_gets_its_shortest_budget():
    trials, _ = simulated(better_by(0.22))
    goal = targets(trials)["naming"]
    assert goal == trials[0].loss
    assert trials[0].search(goal).shortest == 100
    assert trials[1].search(goal).shortest == 80  # 0.01 nats a step: 22 steps sooner, on a grid of 5


def test_a_present_result_is_never_planned_again_and_a_stop_changes_nothing():
    whole, runs = simulated(better_by(0.2))
    results = whole[0].ledger.results
    for stop in (0, 5, 11, len(runs)):
        kept = {run.file_name(): results[run.file_name()] for run in runs[:stop]}
        trials = make_trials(["naming"], [ADAMW, OTHER], SMALL, Ledger(kept))
        planned = {run.file_name() for run in plan(trials, PHASES, targets(trials))}
        assert not planned & kept.keys()
        assert planned <= results.keys()
        assert bool(planned) == (stop < len(runs))


def test_the_full_budget_has_the_last_word_and_then_all_seeds():
    """The best rate moves down between the short and the full budget, and by the second seed again."""

    def losses(run):
        best = 0.01 if run.steps == 50 else 0.005 if run.seed == 0 else 0.00125
        return valley(run, best) + (0.0 if run.seed == 0 else abs(math.log2(run.lr / best)))

    trials, _ = simulated(losses, contenders=(ADAMW,))
    (trial,) = trials
    assert (trial.explored.best, trial.narrowed.best) == (0, -1)
    assert trial.settled.places[0] < trial.best <= -2, "extended with every seed"
    assert not trial.settled.edge


def test_a_rate_with_the_first_seed_alone_is_never_the_best():
    """The other seeds lie so high that the first one's loss at a worse rate is below the best rate's mean."""
    trials, _ = simulated(lambda run: valley(run) + (0.0 if run.seed == 0 else 50.0), contenders=(ADAMW,))
    (trial,) = trials
    assert trial.contender.rate(trial.best) == 0.01
    assert None not in [trial.ledger.loss(run) for run in trial.at_budget(trial.settings.steps)]


def test_a_rate_that_diverges_for_one_seed_is_not_the_best():
    trials, _ = simulated(
        lambda run: None if run.seed == 1 and run.lr >= 0.01 else valley(run), contenders=(ADAMW,)
    )
    assert trials[0].contender.rate(trials[0].best) == 0.005
    assert math.isfinite(trials[0].loss)


def test_a_contender_that_only_diverges_ends_without_a_loss():
    trials, runs = simulated(lambda run: None, contenders=(ADAMW,))
    assert trials[0].loss is None
    assert len(runs) == 3 + SMALL.extensions
    assert targets(trials) == {"naming": None}


def test_a_failure_stops_its_contender_alone():
    trials, runs = simulated(better_by(0.2), contenders=(OTHER, ADAMW), failing=("grit",))
    assert len([run for run in runs if run.optimizer == "grit"]) == 3, "tried once, then left"
    assert trials[0].failure(None) == "ValueError: cannot"
    assert trials[1].loss is not None
    assert targets(trials)["naming"] == trials[1].loss


def test_a_failed_adamw_does_not_hold_up_the_target():
    second = replace(ADAMW, label="adamw-0.6", beta1=0.6)
    trials, _ = simulated(better_by(0.0), contenders=(ADAMW, second))
    broken = trials[1].config(0, 0, 50).file_name()
    results = {
        name: result for name, result in trials[0].ledger.results.items() if result["config"]["beta1"] == 0.9
    }
    again = make_trials(["naming"], [ADAMW, second], SMALL, Ledger(results, {broken: "OSError: gone"}))
    assert targets(again)["naming"] == again[0].loss


def test_the_target_waits_for_every_adamw():
    second = replace(ADAMW, label="adamw-0.6", beta1=0.6)
    trials, _ = simulated(better_by(0.0), contenders=(ADAMW,))
    both = make_trials(["naming"], [ADAMW, second], SMALL, trials[0].ledger)
    assert targets(both) == {"naming": None}


def test_only_the_phases_that_were_asked_for():
    trials, runs = simulated(better_by(0.2), phases=("explore",))
    assert {run.steps for run in runs} == {50}
    assert plan(trials, ("budgets",), {"naming": 2.0}) == [], "its rates are not settled"
    _, runs = simulated(better_by(0.2), phases=("explore", "narrow"))
    assert {run.steps for run in runs} == {50, 100}


def test_exploring_at_the_full_budget_is_not_repeated():
    _, runs = simulated(
        better_by(0.0), contenders=(ADAMW,), settings=replace(SMALL, explore_steps=100, seeds=(0,))
    )
    assert [run.lr for run in runs[:3]] == [0.005, 0.01, 0.02]
    assert all(run.steps < 100 for run in runs[3:]), "what follows are the shorter budgets"


def test_a_contender_reaches_the_run_with_all_its_settings():
    contender = Contender("x", "grit", 0.6, 0.95, {"precondition": "steer"}, 0.01)
    (trial,) = make_trials(
        ["prose"], [contender], replace(SMALL, batch_size=8, rank=4, alpha=2, warmup=3), Ledger()
    )
    run = trial.config(1, 2, 100)
    assert (run.task, run.optimizer, run.lr, run.seed, run.steps) == ("prose", "grit", 0.02, 2, 100)
    assert (run.beta1, run.beta2, run.options) == (0.6, 0.95, {"precondition": "steer"})
    assert (run.batch_size, run.rank, run.alpha, run.warmup, run.eval_every) == (8, 4, 2, 3, 50)
    assert trial.config(1, 2, 70).eval_every == 70, "short runs are measured at their ends alone"


def test_time_left_follows_what_was_measured():
    trials, _ = simulated(better_by(0.2), phases=("explore",))
    results = list(trials[0].ledger.results.values())
    assert duration([]) is None
    assert duration(results)("adamw", 100) == pytest.approx(100 * 0.2 + 10)
    assert duration(results)("never run", 100) == pytest.approx(30)
    runs = plan(trials, PHASES, {"naming": None})
    assert len(runs) == 6
    text = outlook(trials, runs, PHASES, {"naming": None}, jobs=2)
    assert text.startswith("6 runs done, 6 to do now, about ")
    assert "about 2 min for those to do now" in text  # 6 × 30 s, 2 at a time, rounded up
    empty = make_trials(["naming"], [ADAMW], SMALL, Ledger())
    assert "known once the first runs are done" in outlook(empty, plan(empty, PHASES, {}), PHASES, {}, 1)


def test_expected_runs_are_about_those_that_come():
    settings = replace(SMALL, seeds=(0, 1, 2))
    empty = make_trials(["naming"], [ADAMW, OTHER], settings, Ledger())
    guessed = len(plan(empty, PHASES, {})) + len(expected(empty, PHASES, {}))
    trials, runs = simulated(better_by(0.2), settings=settings)
    assert guessed == pytest.approx(len(runs), rel=0.35)
    assert expected(trials, PHASES, targets(trials)) == []
