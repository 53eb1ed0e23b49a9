"""The command `truncation`, and the report of its results."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core import arguments as read
from ..core.command import Command, Study
from ..core.environment import resolve_device
from ..core.results import RunConfig
from ..tasks.registry import TASKS, check_task
from ..training.optimizers import OPTIMIZERS, check_optimizer
from .measure import truncation
from .report import holds, report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", default="naming", help=f"known: {', '.join(TASKS)}")
    parser.add_argument("--optimizer", default="grit", help=f"known: {', '.join(OPTIMIZERS)}")
    parser.add_argument("--lr", type=read.positive, default=1e-2)
    parser.add_argument("--seed", type=read.whole, default=0)
    parser.add_argument("--steps", type=read.positive_int, default=RunConfig.steps)
    parser.add_argument(
        "--batches", type=read.positive_int, default=12, help="fresh training batches for the factors"
    )
    parser.add_argument(
        "--drops",
        type=read.several(read.positive_int),
        default=[1, 2, 4, 8, 12],
        help="directions dropped per site",
    )
    parser.add_argument(
        "--budgets",
        type=read.several(read.positive),
        default=[0.75, 0.5, 0.35, 0.25],
        help="shares of the parameters",
    )
    parser.add_argument("--option", type=read.option, action="append", metavar="KEY=VALUE")
    parser.add_argument("--threads", type=read.positive_int)
    read.add_device(parser)
    parser.add_argument("--out", type=Path, required=True)


def _run(arguments: argparse.Namespace) -> None:
    device, options = resolve_device(arguments.device), dict(arguments.option or [])
    task, optimizer = check_task(arguments.task), check_optimizer(arguments.optimizer)
    config = RunConfig(
        task, optimizer, arguments.lr, arguments.seed, arguments.steps, device=device, options=options,
        eval_every=arguments.steps,
    )  # fmt: skip
    given = (getattr(arguments, name) for name in ("batches", "drops", "budgets", "out", "threads"))
    path = truncation(config, *given)
    print(f"written: {path}; table and figure: python -m benchmarks report {arguments.out}")


STUDY = Study(
    (
        Command(
            "truncation",
            "what dropping directions of a trained adapter costs: predicted, and measured",
            _add_arguments,
            _run,
        ),
    ),
    holds,
    report,
)
