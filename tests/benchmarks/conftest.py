"""The real task and a small model, made once for the folder."""

from dataclasses import asdict
from functools import cache

import pytest

from benchmarks.__main__ import main
from benchmarks.base_model import load as base_model
from benchmarks.core.results import RunConfig
from benchmarks.tasks import embedded, icons, naming
from benchmarks.tasks.task import Task


@pytest.fixture
def refusal(capsys):
    """A function that gives what a command line that must be refused prints as its error."""

    def run(arguments):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def tokenizer():
    return base_model.load_tokenizer()


@pytest.fixture(scope="session")
def rows_of(tokenizer):
    """A function that gives the rows of an embedded task, without warnings about versions."""

    @cache
    def load(recipe):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "warn_if_not_pinned", lambda recipe: None)
            return embedded.load_rows(recipe, tokenizer)

    return load


@pytest.fixture(scope="session")
def rows(rows_of):
    return rows_of(naming.RECIPE)


@pytest.fixture(scope="session")
def naming_task(rows, tokenizer):
    return task_of(naming.RECIPE, rows, tokenizer)


def task_of(recipe, rows, tokenizer):
    """The task of rows that are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "load_rows", lambda recipe, tokenizer: rows)
        return embedded.load(recipe, tokenizer)


@pytest.fixture(scope="session")
def small_task(naming_task):
    """Some examples of naming."""
    return Task("naming", naming_task.train[:64], naming_task.heldout[:16], "small")


@pytest.fixture(scope="session")
def icons_task(rows_of, tokenizer):
    return task_of(icons.RECIPE, rows_of(icons.RECIPE), tokenizer)


@pytest.fixture(scope="session")
def few_icons(icons_task):
    """Some examples of icons."""
    return Task("icons", icons_task.train[:32], icons_task.heldout[:12], "few")


@pytest.fixture
def made_up_result():
    """A function that makes one result; keywords change it, `final` ends its curve."""

    def make(
        optimizer="adamw",
        lr=0.01,
        seed=0,
        curve=((0, 0.0, 5.0), (50, 10.0, 3.0), (100, 20.0, 2.0)),
        **changes,
    ):
        config = asdict(RunConfig("naming", optimizer, lr, seed, steps=100, eval_every=50))
        config |= changes.pop("config", {})
        result = {
            "config": config,
            "curve": [{"step": step, "seconds": seconds, "loss": loss} for step, seconds, loss in curve],
            "diverged": False,
            "final_loss": curve[-1][2],
            "exact_match": 0.25,
            "train_losses": [4.0] * 50 + [2.25] * 25 + [2.75] * 25,
            "epochs": 0.5,
            "seconds": curve[-1][1],
            "step_seconds_median": 0.2,
            "optimizer_state_bytes": 2_000_000,
            "fingerprint": "f" * 64,
            "hardware": {"cpu": "a cpu", "cores": 2, "threads": 2, "gpu": None, "jobs": 1},
            "versions": {"torch": "2.13.0"},
            "code": {"commit": "c" * 40, "dirty": False},
        }
        return result | changes

    return make
