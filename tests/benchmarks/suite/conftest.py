"""Training and timing replaced by functions, for the tests of a suite's folder and its report."""

from dataclasses import asdict

import pytest
from made_up_suite import usual

from benchmarks.comparison.summary import loss_surroundings
from benchmarks.core.files import write_json
from benchmarks.core.results import write_result
from benchmarks.suite import figures as suite_figures
from benchmarks.suite import run as suite_run
from benchmarks.training import runner


@pytest.fixture
def drawn():
    """Tests that look at the figures name it; the others draw none, which takes most of a report's time."""


@pytest.fixture(autouse=True)
def _no_figures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(suite_figures, "draw", lambda *arguments: [])


@pytest.fixture
def pretend(monkeypatch, made_up_result):
    """Replaces training by a function of the configuration (None: diverged, error: failed); lists runs."""

    def install(loss=usual, **changes):
        done = []

        def execute_all(runs, folder, jobs, threads=None, given=None):
            failures = {}
            for run in runs:
                done.append(run)
                try:
                    value = loss(run)
                except ValueError as error:
                    failures[run.file_name()] = f"ValueError: {error}"
                    continue
                curve = ((0, 0.0, 5.0), (run.steps, 20.0, value if value is not None else 9.0))
                ended = {"diverged": value is None, "final_loss": value}
                result = made_up_result(curve=curve, config=asdict(run), wall_seconds=30.0, **ended) | changes
                write_result(folder, result)
            return failures

        def timed(call, config, steps, path, label, given):
            ratio = {"q1": 1.1, "median": 1.2, "q3": 1.3}
            write_json(
                path,
                {
                    "contender": label,
                    "ratio": ratio,
                    "hardware": {"threads": 2, "load_average_before": 0.24},
                    "timed_steps": steps,
                },
            )

        monkeypatch.setattr(runner, "execute_all", execute_all)
        monkeypatch.setattr(runner, "in_process", timed)
        monkeypatch.setattr(runner, "fingerprint", lambda task, data=None: "f" * 64)
        monkeypatch.setattr(suite_run, "conditions", lambda device: loss_surroundings(made_up_result()))
        return done

    return install
