"""Runs what a suite still needs until nothing is left: trainings, and timings of every contender's step."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..comparison.summary import Result, loss_surroundings
from ..core import environment, packing
from ..core.files import BenchmarkError, write_json
from ..core.results import RunConfig
from ..core.settings import REFERENCE
from ..cost import on_task
from ..tasks.registry import PLAIN, Given, check_task
from ..training import runner
from ..training.optimizers import check_optimizer
from .contenders import check_settings, cost_name
from .folder import FAILED, Suite, open_suite, read_ledger
from .outlook import outlook
from .sweep import Ledger, Trial, plan, targets


def _check_surroundings(results: Sequence[Result], now: Mapping[str, str]) -> None:
    """Refuse to go on in a folder whose results were made with another accelerator or other versions."""
    for result in results:
        before = loss_surroundings(result)
        differing = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
        if differing:
            what = "; ".join(f"{name}: {before[name]} there, {now[name]} now" for name in differing)
            raise BenchmarkError(
                f"the folder's results were made under other conditions ({what}), and their losses would be "
                "mixed; go on where they were made, or choose another --out"
            )


def conditions(device: str) -> dict[str, str]:
    """The accelerator and the versions here and now, which losses depend on."""
    return loss_surroundings({"hardware": environment.hardware(device), "versions": environment.versions()})


@dataclass(frozen=True)
class Stay:
    """One call of the command: what it was asked for, in which folder, with how many processes."""

    folder: Path
    asked: Suite
    whole: Suite
    phases: Collection[str]
    jobs: int
    threads: int | None
    given: Given

    def trials(self, failures: Mapping[str, str]) -> tuple[list[Trial], dict[str, float | None]]:
        """The trials that were asked for, and the targets that AdamW's runs in the folder set."""
        ledger = Ledger(read_ledger(self.folder).results, failures)
        return self.asked.trials(ledger), targets(self.whole.trials(ledger))


def _note_failures(folder: Path, runs: Sequence[RunConfig], failures: Mapping[str, str]) -> None:
    """Keep what went wrong beside the results, for the report; forget it where a run has succeeded since."""
    for run in runs:
        path = folder / FAILED / run.file_name()
        if error := failures.get(run.file_name()):
            write_json(path, {"config": asdict(run), "error": error})
        else:
            path.unlink(missing_ok=True)


def _say_where_no_target_is(stay: Stay, target: Mapping[str, float | None]) -> None:
    """Say on which tasks budgets cannot be searched, since AdamW's best loss is not known there yet."""
    missing = [task for task in stay.asked.tasks if target.get(task) is None]
    adamw = [one.label for one in stay.whole.contenders if one.optimizer == REFERENCE]
    if "budgets" in stay.phases and missing:
        print(
            f"no budgets on {', '.join(missing)}: AdamW's best is not known there yet; the folder's AdamW "
            f"contenders are {', '.join(adamw)}, and all of them have to be through with explore and narrow"
        )


def _train(stay: Stay) -> dict[str, str]:
    """Plan and run until nothing is left; returns the failures of this call, none of which is tried twice."""
    failures: dict[str, str] = {}
    while True:
        trials, target = stay.trials(failures)
        planned = plan(trials, stay.phases, target)
        if not planned:
            _say_where_no_target_is(stay, target)
            return failures
        runs = runner.pending(planned, stay.folder, stay.given)
        if not runs:
            raise BenchmarkError(
                f"{stay.folder} changed while it was being read; start the same command again"
            )
        print(outlook(trials, runs, stay.phases, target, stay.jobs))
        found = runner.execute_all(runs, stay.folder, stay.jobs, stay.threads, stay.given)
        failures |= found
        _note_failures(stay.folder, runs, found)


def _time_steps(stay: Stay) -> dict[str, str]:
    """Time every contender's step on the first task against AdamW's; returns what failed."""
    failures: dict[str, str] = {}
    for trial in stay.trials({})[0]:
        path = stay.folder / cost_name(trial.task, trial.contender.label)
        if trial.task != stay.whole.tasks[0] or trial.best is None or packing.exists(path):
            continue
        config = trial.config(trial.best, trial.settings.seeds[0], trial.settings.steps)
        try:
            steps, label = trial.settings.cost_steps, trial.contender.label
            runner.in_process(_cost, config, steps, path, label, stay.given)
        except Exception as error:  # whatever the contender does wrong; the others are still to be timed
            failures[path.name] = f"{type(error).__name__}: {error}"
            print(f"failed: {path.name}: {failures[path.name]}", file=sys.stderr)
            write_json(
                stay.folder / FAILED / path.name, {"config": asdict(config), "error": failures[path.name]}
            )
        else:
            (stay.folder / FAILED / path.name).unlink(missing_ok=True)
    return failures


def _cost(config: RunConfig, steps: int, path: Path, label: str, given: Given) -> None:
    on_task.cost(config, steps, path, given=given, contender=label)


def run_suite(
    folder: Path,
    suite: Suite,
    phases: Collection[str],
    jobs: int = 1,
    threads: int | None = None,
    given: Given = PLAIN,
) -> None:
    """Run what the suite still needs in these phases; an error at the end that names the runs that failed."""
    suite = replace(suite, settings=check_settings(suite.settings))
    for contender in suite.contenders:
        check_optimizer(contender.optimizer)
    for task in suite.tasks:
        # Makes the data once, before several processes want them.
        runner.fingerprint(task if given.data else check_task(task), given)
    _check_surroundings(list(read_ledger(folder).results.values()), conditions(suite.settings.device))
    stay = Stay(folder, suite, open_suite(folder, suite), phases, jobs, threads, given)
    failures = _train(stay)
    if "cost" in phases:
        failures |= _time_steps(stay)
    if failures:
        lines = [f"{name}: {error}" for name, error in failures.items()]
        raise BenchmarkError(f"{len(failures)} runs failed; the others are done:\n" + "\n".join(lines))
