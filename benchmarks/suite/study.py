"""The command `run`: a grid of runs, or with `--suite` a whole suite."""

from __future__ import annotations

import argparse

from ..comparison import grid
from ..core.command import Command, Study
from . import arguments as suite_arguments
from .folder import RECORD
from .report import report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    grid.add_arguments(parser)
    suite_arguments.add(parser)


def _run(arguments: argparse.Namespace) -> None:
    suite_arguments.check(arguments)
    (suite_arguments.run if arguments.suite else grid.run)(arguments)
    out = arguments.out
    print(f"results in {out}; table and figures: python -m benchmarks report {out}")


RUN = Command("run", "train LoRA with several optimizers, learning rates and seeds", _add_arguments, _run)
STUDY = Study((RUN,), lambda folder: (folder / RECORD).exists(), report)
