"""The command `tasks`."""

from __future__ import annotations

import argparse

from ..core import arguments as read
from ..core.command import Command, Study
from .describe import describe
from .registry import TASKS, check_task


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        type=read.several(str),
        default=sorted(TASKS),
        help=f"known: {', '.join(TASKS)}; by default all",
    )


def _run(arguments: argparse.Namespace) -> None:
    describe([check_task(name) for name in arguments.task])


STUDY = Study(
    (
        Command(
            "tasks",
            "sizes, lengths and the untrained base model's loss of embedded tasks",
            _add_arguments,
            _run,
        ),
    )
)
