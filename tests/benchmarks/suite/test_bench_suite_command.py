"""The suite's command: what it refuses, and once for real."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.cost import on_task
from benchmarks.suite.contenders import cost_name
from benchmarks.suite.folder import read_ledger, read_suite
from benchmarks.tasks import registry
from benchmarks.tasks.task import Task
from benchmarks.training import runner

SUITE = ["run", "--suite", "peers", "--out", "never"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SUITE, "--lrs", "1"], "--suite brings its own: leave out --lrs"),
        ([*SUITE, "--beta1", "0.5", "--task", "naming"], "leave out --task, --beta1"),
        ([*SUITE, "--phases", "explore,sleep"], "unknown phase sleep; known: explore, narrow, budgets, cost"),
        ([*SUITE, "--contenders", "adamw,sgdx"], "no contender sgdx in suite 'peers'; known: adamw,"),
        ([*SUITE, "--contenders", "adamw", "--tasks", "poetry"], "unknown task 'poetry'"),
        (
            [*SUITE, "--contenders", "adamw", "--steps", "5", "--explore-steps", "6"],
            "explore_steps 6 is more than",
        ),
        (["run", "--suite", "best", "--out", "never"], "invalid choice: 'best'"),
        (
            ["run", "--optimizers", "adamw", "--lrs", "1", "--out", "never", "--quick"],
            "--quick: only with --suite",
        ),
        (
            ["run", "--optimizers", "adamw", "--lrs", "1", "--out", "x", "--tasks", "naming"],
            "--tasks: only with --suite",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message, refusal):
    assert message in refusal(arguments)


@pytest.fixture
def in_this_process(monkeypatch, naming_task):
    """The real command on a task of few examples, without processes of its own."""
    few = sorted(naming_task.train, key=len)
    small = Task("naming", tuple(few[:32]), tuple(few[32:40]), "small")
    monkeypatch.setattr(on_task, "WARMUP", 1)
    monkeypatch.setattr(registry, "load_task", lambda name, tokenizer, data=None: small)
    monkeypatch.setattr(runner, "in_process", lambda call, *arguments: call(*arguments))
    runner.fingerprint.cache_clear()
    yield
    runner.fingerprint.cache_clear()


def test_the_real_command_from_nothing_to_the_report(tmp_path, drawn, in_this_process, capsys):
    sizes = ["--steps", "2", "--explore-steps", "2", "--batch-size", "2", "--eval-every", "2", "--seeds", "0"]
    narrow = [
        "--extensions",
        "0",
        "--budget-grid",
        "0.5",
        "--shortest-budget",
        "0.5",
        "--longest-budget",
        "1",
    ]
    who = [
        "--contenders",
        "adamw,grit",
        "--tasks",
        "naming",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--cost-steps",
        "1",
    ]
    command = ["run", "--suite", "peers", "--out", str(tmp_path), *sizes, *narrow, *who]
    assert main(command) == 0, capsys.readouterr().err
    results = read_ledger(tmp_path).results
    assert {(r["config"]["optimizer"], r["config"]["steps"]) for r in results.values()} >= {
        ("adamw", 1), ("adamw", 2), ("grit", 2),
    }  # fmt: skip
    assert all(r["wall_seconds"] > r["seconds"] > 0 for r in results.values())
    for label in ("adamw", "grit"):
        timed = json.loads((tmp_path / cost_name("naming", label)).read_text())
        assert (timed["contender"], timed["optimizer"], timed["betas"]) == (label, label, [0.9, 0.99])
        assert timed["ratio"]["median"] > 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("naming-*.json")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("naming-*.json")} == times
    assert main(["report", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text()
    adamw = read_suite(tmp_path).trials(read_ledger(tmp_path))[0]
    assert f"| adamw | 0.9, 0.99 | {adamw.loss:.3f} (n=1) |" in table
