"""The command `rates`: AdamW and GRIT at the same learning rates, far below the best one and above it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..comparison import grid
from ..core import arguments as read
from ..core.command import Command, Study
from ..core.settings import REFERENCE
from .report import TABLE, report

SHARES = tuple(2.0**-k for k in range(5, -2, -1))  # from 1/32 of the best rate to twice the best


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    grid.add_arguments(parser)
    parser.add_argument(
        "--best",
        type=read.positive,
        default=1e-2,
        help="AdamW's best learning rate; the others are 1/32 to 2 times it, unless --lrs names them",
    )


def _run(arguments: argparse.Namespace) -> None:
    arguments.optimizers = arguments.optimizers or [REFERENCE, "grit"]
    arguments.lrs = arguments.lrs or [share * arguments.best for share in SHARES]
    grid.run(arguments)
    report(arguments.out)


def holds(folder: Path) -> bool:
    """Whether the folder's results were reported by this study before."""
    return (folder / TABLE).exists()


RATES = Command("rates", "AdamW against GRIT at the same learning rates", _add_arguments, _run)
STUDY = Study((RATES,), holds, report)
