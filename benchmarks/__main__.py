"""The command line, `python -m benchmarks COMMAND`: every study brings its commands and its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .adapter_size import study as adapter_size
from .base_model import study as base_model
from .comparison import study as comparison
from .core import command, packing_study
from .cost import study as cost
from .curvature import study as curvature
from .finetune import study as finetune
from .fisher_distance import study as fisher_distance
from .rates import study as rates
from .suite import study as suite
from .tasks import study as tasks
from .truncation import study as truncation

# The first study that holds a folder reports on it. A suite's folder has cost files too, so suite stands
# before cost. Comparison takes every folder that is left.
STUDIES: tuple[command.Study, ...] = (
    base_model.STUDY,
    tasks.STUDY,
    suite.STUDY,
    cost.STUDY,
    truncation.STUDY,
    adapter_size.STUDY,
    fisher_distance.STUDY,
    curvature.STUDY,
    rates.STUDY,
    finetune.STUDY,
    packing_study.STUDY,
    comparison.STUDY,
)


def _report(arguments: argparse.Namespace) -> None:
    for study in STUDIES:
        if study.report and study.holds and study.holds(arguments.folder):
            study.report(arguments.folder)
            return


REPORT = command.Command(
    "report",
    "table and figures from the results in a folder",
    lambda parser: parser.add_argument("folder", type=Path),
    _report,
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    commands = [REPORT, *(one for study in STUDIES for one in study.commands)]
    return command.make_parser(commands, "python -m benchmarks", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return command.call(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
