"""The command `main`, and the report of any folder with results of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core import arguments as read
from ..core.command import Command, Study
from ..core.environment import resolve_device
from ..core.files import REPOSITORY
from ..core.results import RunConfig
from ..core.settings import REFERENCE
from ..tasks.registry import TASKS, check_task
from ..training.runner import plan, run_all
from .answers import page
from .report import report

LRS, OPTIMIZERS = [5e-3, 1e-2, 2e-2], [REFERENCE, "grit"]  # the best rate lies between the others


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", default="naming", help=f"known: {', '.join(TASKS)}; by default naming")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "main")
    parser.add_argument("--steps", type=read.positive_int, default=RunConfig.steps)
    read.add_device(parser)


def _run(arguments: argparse.Namespace) -> None:
    task = check_task(arguments.task)
    template = RunConfig(task, "", 0.0, 0, steps=arguments.steps, device=resolve_device(arguments.device))
    run_all(plan(template, OPTIMIZERS, LRS, [0]), arguments.out)
    report(arguments.out)


MAIN = Command(
    "main", "the comparison in the README: AdamW against GRIT, a few minutes", _add_arguments, _run
)


def _add_answers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument("--optimizer", help="the best run of this one; by default the folder's best")
    parser.add_argument("--out", type=Path, help="by default answers.png in the folder")


def _answers(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.folder / "answers.png"
    print(page(arguments.folder, out, arguments.optimizer))


ANSWERS = Command(
    "answers",
    "a page of held-out pictures with right and wrong answers, of a folder's best run",
    _add_answers,
    _answers,
)
STUDY = Study(
    (MAIN, ANSWERS), lambda folder: True, report
)  # a folder without results is an error that says what to run
