"""The command `curvature`: records a run, by default the README's; `python -m grit_optim plot` draws it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..core import arguments as read
from ..core.command import Command, Study
from ..core.results import RunConfig
from ..tasks.registry import TASKS, check_task
from .record import record


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", default="naming", help=f"known: {', '.join(TASKS)}; by default naming")
    parser.add_argument("--lr", type=read.positive, default=1e-2)
    parser.add_argument("--steps", type=int, default=RunConfig.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)


def _run(arguments: argparse.Namespace) -> None:
    config = RunConfig(check_task(arguments.task), "grit", arguments.lr, 0, steps=arguments.steps)
    print(record(arguments.out, config, arguments.threads))


CURVATURE = Command(
    "curvature", "record the curvature of GRIT's run in `main` while it trains", _add_arguments, _run
)
STUDY = Study((CURVATURE,))
