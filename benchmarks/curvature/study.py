"""The command `curvature`: records the README's run, which `python -m grit_optim plot` draws."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..core.command import Command, Study
from ..core.results import RunConfig
from .record import record


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=RunConfig.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)


def _run(arguments: argparse.Namespace) -> None:
    config = RunConfig("naming", "grit", 1e-2, 0, steps=arguments.steps)
    print(record(arguments.out, config, arguments.threads))


CURVATURE = Command(
    "curvature", "record the curvature of GRIT's run in `main` while it trains", _add_arguments, _run
)
STUDY = Study((CURVATURE,))
