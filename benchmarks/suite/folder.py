"""A suite's folder: its record of what belongs to it, its results and its failures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core import packing
from ..core.files import BenchmarkError, write_json
from ..core.results import RunConfig, read_result
from .contenders import FIXED_SETTINGS, Contender, SuiteSettings
from .sweep import Ledger, Trial, make_trials

RECORD, FAILED = "suite.json", "failed"


@dataclass(frozen=True)
class Suite:
    """A suite: its sizes, tasks and contenders."""

    settings: SuiteSettings
    tasks: tuple[str, ...]
    contenders: tuple[Contender, ...]

    def trials(self, ledger: Ledger) -> list[Trial]:
        """Every contender on every task."""
        return make_trials(self.tasks, self.contenders, self.settings, ledger)


def read_suite(folder: Path) -> Suite:
    """The suite that a folder holds."""
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = SuiteSettings(**{**found["settings"], "seeds": tuple(found["settings"]["seeds"])})
        return Suite(settings, tuple(found["tasks"]), tuple(Contender(**one) for one in found["contenders"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} is no record of a suite ({error}); delete it and run the suite again"
        ) from error


def _united(old: Suite, new: Suite, folder: Path) -> Suite:
    """Both suites in one; an error where their runs cannot be compared."""
    for name in FIXED_SETTINGS:
        before, now = getattr(old.settings, name), getattr(new.settings, name)
        if before != now:
            raise BenchmarkError(
                f"{folder} holds a suite with {name} {before}, asked for is {now}; choose another --out"
            )
    contenders = {one.label: one for one in old.contenders}
    for one in new.contenders:
        if contenders.setdefault(one.label, one) != one:
            raise BenchmarkError(
                f"{folder} holds a contender {one.label!r} with other settings ({contenders[one.label]}, now "
                f"{one}); choose another --out"
            )
    return Suite(new.settings, tuple(dict.fromkeys((*old.tasks, *new.tasks))), tuple(contenders.values()))


def open_suite(folder: Path, suite: Suite) -> Suite:
    """Record the suite in its folder; returns it together with what the folder's record held before."""
    whole = _united(read_suite(folder), suite, folder) if (folder / RECORD).exists() else suite
    write_json(folder / RECORD, asdict(whole))
    return whole


def read_ledger(folder: Path) -> Ledger:
    """All results of the folder, and the failures that no later result made good."""
    results = [read_result(path) for path in packing.paths(folder, "*-seed*.json")]
    by_name = {RunConfig(**result["config"]).file_name(): result for result in results}
    notes = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder / FAILED).glob("*.json"))
    }
    return Ledger(by_name, {name: note["error"] for name, note in notes.items() if name not in by_name})
