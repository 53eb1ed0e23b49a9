"""The command `sizes`, and the report of its results."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core import arguments as read
from ..core.command import Command, Study
from ..core.environment import resolve_device
from ..core.results import PRECISIONS, RunConfig
from ..tasks.registry import TEXT_TASKS, check_text_task
from .measure import WAYS, adapter_sizes
from .report import holds, report

BY_DEFAULT = [way for way in WAYS if way != "rounded"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", default="naming", help=f"known: {', '.join(TEXT_TASKS)}")
    parser.add_argument(
        "--ways",
        type=read.several(str),
        default=BY_DEFAULT,
        help=f"by default {', '.join(BY_DEFAULT)}; whole: GRIT, and its adapter cut by SVD and by predicted "
        "loss; besides rounded: saved in bf16, at a budget of 1 the whole adapter",
    )
    parser.add_argument(
        "--budgets",
        type=read.several(read.positive),
        default=[0.75, 0.49, 0.25],
        help="shares of the whole adapter",
    )
    parser.add_argument("--seeds", type=read.several(read.whole), default=[0, 1, 2])
    parser.add_argument(
        "--lrs", type=read.several(read.positive), default=[1e-2], help="report keeps each way's best"
    )
    parser.add_argument("--beta1", type=read.beta, default=RunConfig.beta1)
    parser.add_argument("--steps", type=read.positive_int, default=RunConfig.steps)
    parser.add_argument("--precision", choices=PRECISIONS, default=RunConfig.precision)
    parser.add_argument("--option", type=read.option, action="append", metavar="KEY=VALUE", help="for GRIT")
    parser.add_argument("--threads", type=read.positive_int)
    read.add_device(parser)
    parser.add_argument("--out", type=Path, required=True)


def _run(arguments: argparse.Namespace) -> None:
    task, steps = check_text_task(arguments.task, "sizes"), arguments.steps
    config = RunConfig(
        task, "", 0.0, 0, steps, beta1=arguments.beta1, eval_every=steps,
        device=resolve_device(arguments.device), precision=arguments.precision,
        options=dict(arguments.option or []),
    )  # fmt: skip
    given = (getattr(arguments, name) for name in ("ways", "budgets", "lrs", "seeds", "out", "threads"))
    adapter_sizes(config, *given)
    print(f"results in {arguments.out}; table and figure: python -m benchmarks report {arguments.out}")


STUDY = Study(
    (
        Command(
            "sizes", "held-out loss against bytes of the saved adapter, several ways", _add_arguments, _run
        ),
    ),
    holds,
    report,
)
