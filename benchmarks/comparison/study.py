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
from ..training.runner import plan, run_all
from .report import report

LRS, OPTIMIZERS = [5e-3, 1e-2, 2e-2], [REFERENCE, "grit"]  # the best rate lies between the others


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "main")
    parser.add_argument("--steps", type=read.positive_int, default=RunConfig.steps)
    read.add_device(parser)


def _run(arguments: argparse.Namespace) -> None:
    template = RunConfig("naming", "", 0.0, 0, steps=arguments.steps, device=resolve_device(arguments.device))
    run_all(plan(template, OPTIMIZERS, LRS, [0]), arguments.out)
    report(arguments.out)


MAIN = Command(
    "main", "the comparison in the README: AdamW against GRIT, a few minutes", _add_arguments, _run
)
STUDY = Study(
    (MAIN,), lambda folder: True, report
)  # a folder without results is an error that says what to run
