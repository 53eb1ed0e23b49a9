"""Command line: `python -m benchmarks COMMAND`. Each study brings its own commands; `report` asks whose results a folder holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .adapter_size import study as adapter_size
from .base_model import study as base_model
from .comparison import study as comparison
from .core.command import Command, Study, call
from .core.command import make_parser as make_parser_of
from .cost import study as cost
from .curvature import study as curvature
from .finetune import study as finetune
from .fisher_distance import study as fisher_distance
from .suite import study as suite
from .tasks import study as tasks
from .truncation import study as truncation

# The first study that holds a folder reports on it: a suite's folder has cost files too, and any folder is a comparison's.
STUDIES: tuple[Study, ...] = tuple(
    one.STUDY
    for one in (
        base_model, tasks, suite, cost, truncation, adapter_size, fisher_distance, curvature, finetune, comparison,
    )
)  # fmt: skip


def _report(arguments: argparse.Namespace) -> None:
    for study in STUDIES:
        if study.report and study.holds and study.holds(arguments.folder):
            study.report(arguments.folder)
            return


REPORT = Command(
    "report",
    "table and figures from the results in a folder",
    lambda parser: parser.add_argument("folder", type=Path),
    _report,
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    commands = [command for study in STUDIES for command in study.commands]
    return make_parser_of([*commands, REPORT], "python -m benchmarks", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return call(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
