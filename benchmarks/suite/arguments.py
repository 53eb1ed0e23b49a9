"""The part of `run`'s command line that belongs to suites."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ..core import arguments as read
from ..core.environment import resolve_device
from ..core.files import BenchmarkError
from ..tasks.registry import TASKS
from .contenders import (
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
_PLAIN_ONLY = (
    "task", "data", "max_length", "optimizers", "lrs", "beta1", "beta2", "option", "base", "adapted_layers",
    "train_examples", "eval_examples", "cache",
)  # fmt: skip


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
    group.add_argument("--tasks", type=read.several(str), help=f"by default {','.join(TASKS)}")
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
    given: dict[str, Any] = {name: getattr(arguments, name) for name in (*RUN_SETTINGS, *_SUITE_SETTINGS)}
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
    quick = arguments.quick
    labels = arguments.contenders or (QUICK_CONTENDERS if quick else None)
    tasks = arguments.tasks or list(TASKS)[: QUICK_TASKS if quick else None]
    suite = Suite(settings(arguments), tuple(tasks), choose(arguments.suite, labels))
    run_suite(arguments.out, suite, _phases(arguments.phases), arguments.jobs, arguments.threads)
