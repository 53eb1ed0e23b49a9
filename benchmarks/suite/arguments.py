"""The part of `run`'s command line that belongs to suites."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ..base_model.source import check_source
from ..comparison import grid
from ..core import arguments as read
from ..core.environment import resolve_device
from ..core.files import BenchmarkError
from ..tasks.external import check_data
from ..tasks.registry import TASKS, TEXT_TASKS
from .contenders import (
    EXAMPLES,
    PHASES,
    QUICK_CONTENDERS,
    QUICK_SETTINGS,
    QUICK_TASKS,
    RUN_SETTINGS,
    SUITES,
    SuiteSettings,
    choose,
)
from .folder import Suite
from .run import run_suite

_SUITE_SETTINGS = {
    "explore_steps": (read.positive_int, "steps of the runs that first search the learning rate"),
    "extensions": (read.whole, "rates that a search may add before it gives up as not bracketed"),
    "budget_grid": (read.positive, "distance of two budgets, as a share of the full one"),
    "shortest_budget": (
        read.positive,
        "shortest budget that is tried first, as a share of the full one; shorter ones where it reaches the "
        "target",
    ),
    "longest_budget": (
        read.positive,
        "budget at which a contender is tried that misses the target at the full one",
    ),
    "cost_steps": (read.positive_int, "timed steps of a contender, and as many of AdamW"),
}
_SUITE_ONLY = ("contenders", "tasks", "quick", "phases", *_SUITE_SETTINGS)
_PLAIN_ONLY = ("task", "optimizers", "lrs", "beta1", "beta2", "option")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of suites to `run`."""
    group = parser.add_argument_group(
        "suites", "a suite brings its optimizers, and searches their learning rates"
    )
    group.add_argument(
        "--suite", choices=sorted(SUITES), help="run a whole comparison; stopped, it goes on from there"
    )
    group.add_argument(
        "--contenders", type=read.several(str), help="only these, by label; by default all of the suite"
    )
    group.add_argument(
        "--tasks",
        type=read.several(str),
        help=f"known: {', '.join(TASKS)}; by default {','.join(TEXT_TASKS)}",
    )
    group.add_argument("--phases", type=read.several(str), help=f"by default {','.join(PHASES)}")
    group.add_argument(
        "--quick", action="store_true", default=None, help="one seed, few contenders, under half an hour"
    )
    for name, (kind, text) in _SUITE_SETTINGS.items():
        group.add_argument(
            read.flag(name), type=kind, help=f"{text}; by default {getattr(SuiteSettings, name)}"
        )


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that the command would ignore, and name those that it lacks."""
    wrong = [
        name
        for name in (_PLAIN_ONLY if arguments.suite else _SUITE_ONLY)
        if getattr(arguments, name) is not None
    ]
    if wrong:
        names = ", ".join(map(read.flag, wrong))
        raise BenchmarkError(
            f"--suite brings its own: leave out {names}" if arguments.suite else f"{names}: only with --suite"
        )
    missing = [
        name for name in ("optimizers", "lrs") if not arguments.suite and getattr(arguments, name) is None
    ]
    if missing:
        raise BenchmarkError(
            f"the following arguments are required: {', '.join(map(read.flag, missing))} (or --suite)"
        )


def _phases(given: list[str] | None) -> list[str]:
    unknown = [name for name in given or () if name not in PHASES]
    if unknown:
        raise BenchmarkError(f"unknown phase {', '.join(unknown)}; known: {', '.join(PHASES)}")
    return given or list(PHASES)


def settings(arguments: argparse.Namespace) -> SuiteSettings:
    """The suite's sizes, with what the command line says on top."""
    names = (*RUN_SETTINGS, *_SUITE_SETTINGS, *EXAMPLES)
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    given["base"] = grid.given(arguments).source.name
    given = {name: value for name, value in given.items() if value is not None}
    if "rank" in given:
        given.setdefault("alpha", given["rank"])
    if arguments.seeds is not None:
        given["seeds"] = tuple(arguments.seeds)
    sizes = QUICK_SETTINGS if arguments.quick else SuiteSettings()
    if "explore_steps" not in given and "steps" in given:  # the same share of the full budget
        given["explore_steps"] = max(1, given["steps"] * sizes.explore_steps // sizes.steps)
    return replace(sizes, device=resolve_device(arguments.device), **given)


def run(arguments: argparse.Namespace) -> None:
    """Carry out the suite that the command line asks for."""
    given = grid.given(arguments)
    check_source(given.source)
    labels = arguments.contenders or (QUICK_CONTENDERS if arguments.quick else None)
    suite = Suite(settings(arguments), _tasks(arguments), choose(arguments.suite, labels))
    run_suite(arguments.out, suite, _phases(arguments.phases), arguments.jobs, arguments.threads, given)


def _tasks(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.data and arguments.tasks:
        raise BenchmarkError("--data and --tasks name different data: one call for each, with the same --out")
    if arguments.data:
        return (check_data(arguments.data[0]),)
    return tuple(arguments.tasks or TEXT_TASKS[: QUICK_TASKS if arguments.quick else None])
