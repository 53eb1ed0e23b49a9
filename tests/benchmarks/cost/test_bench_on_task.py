"""Steps timed in turns on a task: the batches, the rates, the order of the blocks."""

import dataclasses

import pytest

from benchmarks.core.files import BenchmarkError
from benchmarks.core.results import RunConfig
from benchmarks.cost import on_task
from benchmarks.cost.on_task import measure
from benchmarks.cost.timing import abba, quartiles
from benchmarks.training.train import Run


def config(**changes):
    return dataclasses.replace(
        RunConfig("naming", "adamw", 5e-3, 0, steps=3, batch_size=4, eval_every=2), **changes
    )


def test_both_lanes_of_the_cost_see_the_same_batches(small_task):
    result = measure(config(steps=20), small_task, 7)
    assert result["ratio"]["q1"] <= result["ratio"]["median"] <= result["ratio"]["q3"]
    assert result["ratio_of_totals"] > 0
    sizes = result["optimizer_state_bytes"]
    assert sizes["plain adamw"] == sizes["optimizer"] > 0


def test_plain_adamw_is_timed_at_a_rate_of_its_own_and_a_diverged_run_not_at_all(small_task, monkeypatch):
    made = []
    monkeypatch.setattr(on_task, "Run", lambda *given: made.append(Run(*given)) or made[-1])
    with pytest.raises(
        BenchmarkError, match=r"grit-none at learning rate 1e\+30 diverged while it was timed"
    ):
        measure(config(optimizer="grit-none", lr=1e30, beta1=0.5, steps=20), small_task, 1)
    assert [(run.config.optimizer, run.config.lr, run.config.beta1) for run in made] == [
        ("adamw", 5e-3, 0.9),
        ("grit-none", 1e30, 0.5),
    ]


def test_order_of_blocks_and_quartiles():
    assert abba(3) == [0, 1, 1, 0, 0, 1]
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert quartiles([7.0]) == {"q1": 7.0, "median": 7.0, "q3": 7.0}
