"""The report of a suite from its folder's files: the table, as Markdown and as JSON, and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..comparison.summary import Result, comparable, loss_surroundings, sections
from ..core import packing
from ..core.bootstrap import Interval
from ..core.files import BenchmarkError, write_json, write_text
from ..core.results import RunConfig
from . import figures
from .contenders import cost_name
from .folder import Suite, read_ledger, read_suite
from .summary import Standing, entries
from .sweep import Ledger, reference
from .tables import table


def _number(value: float | None) -> float | str | None:
    """A number as JSON takes it; an infinite ratio means that the target was not reached."""
    return "not reached" if value is not None and math.isinf(value) else value


def _ends(found: Interval | None) -> list[float | str | None] | None:
    return [_number(found.low), _number(found.high)] if found else None


def _standing_data(one: Standing) -> dict[str, Any]:
    unbracketed = bool(one.trial.settled and one.trial.settled.edge)
    return {
        "best_lr": one.lr,
        "bracketed": None if one.lr is None else not unbracketed,
        "loss_mean": one.trial.loss,
        "loss_spread": one.spread,
        "losses": one.losses,
        "steps_ratio": _number(one.steps_ratio),
        "steps_ratio_at_limit": bool(one.search and one.search.at_limit),
        "steps_ratio_interpolated": _number(one.interpolated),
        "steps_ratio_interval": _ends(one.interval),
        "remarks": one.remarks,
    }


def data(suite: Suite, ledger: Ledger, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The table's numbers as plain data: losses in nats per token, ratios to AdamW, sizes in bytes."""
    trials = suite.trials(ledger)
    best = {task: reference(trials, task) for task in suite.tasks}
    return {
        "targets": {
            task: one and {"loss": one.loss, "contender": one.contender.label} for task, one in best.items()
        },
        "contenders": [
            {
                "label": entry.contender.label,
                "optimizer": entry.contender.optimizer,
                "betas": [entry.contender.beta1, entry.contender.beta2],
                "options": entry.contender.options,
                "loss_mean_over_tasks": entry.loss,
                "steps_ratio": _number(entry.steps_ratio),
                "steps_ratio_at_least": entry.at_least,
                "steps_ratio_interpolated": _number(entry.interpolated),
                "steps_ratio_interval": _ends(entry.interval),
                "seconds_ratio": _number(entry.seconds_ratio),
                "step_time_ratio": dict(entry.step_time) if entry.step_time else None,
                "optimizer_state_bytes": entry.state_bytes,
                "remarks": entry.remarks,
                "commits": entry.commits,
                "tasks": {one.trial.task: _standing_data(one) for one in entry.standings},
            }
            for entry in entries(trials, costs)
        ],
    }


def _surroundings(results: Sequence[Result]) -> Callable[[Result], dict[str, str]]:
    """What must agree within one table: accelerator and versions, of those that every result states."""
    shared = set.intersection(*(set(loss_surroundings(result)) for result in results))
    return lambda result: {name: value for name, value in loss_surroundings(result).items() if name in shared}


def _check_data(results: Sequence[Result]) -> None:
    """An error where one task was run on two sets of data."""
    first: dict[str, str] = {}
    for result in results:
        task, found = result["config"]["task"], result["fingerprint"]
        if first.setdefault(task, found) != found:
            raise BenchmarkError(
                f"task {task}: results on different data or base models ({first[task][:12]} and "
                f"{found[:12]}) are in one folder; move one kind out"
            )


def _groups(ledger: Ledger) -> list[tuple[dict[str, str], Ledger]]:
    """Results that may be compared, with what the groups differ in."""
    results = list(ledger.results.values())
    _check_data(results)
    return [
        (difference, Ledger({RunConfig(**one["config"]).file_name(): one for one in group}, ledger.failures))
        for difference, group in comparable(results, _surroundings(results))
    ]


def read_costs(folder: Path, suite: Suite) -> dict[str, Any]:
    """Step times by contender, of those that have been measured."""
    paths = {one.label: folder / cost_name(suite.tasks[0], one.label) for one in suite.contenders}
    return {label: packing.read(path) for label, path in paths.items() if packing.exists(path)}


def report(folder: Path) -> str:
    """Write `table.md`, `table.json` and the figures into the suite's folder, and print the table.

    Results of different accelerators or versions never share a table: each such group gets its own.
    """
    suite, ledger = read_suite(folder), read_ledger(folder)
    if not ledger.results:
        raise BenchmarkError(
            f"no results in {folder}; run the suite first: python -m benchmarks run --suite … --out {folder}"
        )
    costs, groups, parts, drawn = read_costs(folder, suite), _groups(ledger), list[str](), list[Path]()
    for above, group, ending in sections(groups):
        parts += [*above, table(suite, group, costs)]
        drawn += figures.draw(suite, group, costs, folder, ending)
    found = [{"differs_in": difference, **data(suite, group, costs)} for difference, group in groups]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "table.md", text)
    write_json(folder / "table.json", {"groups": found, "settings": asdict(suite.settings)})
    print(text)
    written = [folder / "table.md", folder / "table.json", *drawn]
    print("\n".join(["written:", *(f"  {path}" for path in written)]))
    return text
