"""What `benchmarks/gpu.sh` needs besides the benchmarks: `python -m benchmarks.gpu_summary COMMAND`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..core.command import Command, call, make_parser
from ..core.files import BenchmarkError, write_json
from .machine import describe, optimizers
from .summary import summary


def _environment(arguments: argparse.Namespace) -> None:
    found = describe()
    write_json(arguments.file, found)
    print(json.dumps(found, indent=1))


def _summary(arguments: argparse.Namespace) -> None:
    try:
        print(summary(arguments.folder))
    except OSError as error:
        raise BenchmarkError(f"cannot summarise {arguments.folder}: {error}") from error


COMMANDS = (
    Command(
        "environment",
        "write versions, devices and missing packages into a file, and print them",
        lambda parser: parser.add_argument("file", type=Path),
        _environment,
    ),
    Command(
        "optimizers",
        "print the optimizers to compare, as far as their packages are installed",
        lambda parser: None,
        lambda arguments: print(",".join(optimizers())),
    ),
    Command(
        "summary",
        "write summary.md and summary.json into the folder of a run of gpu.sh",
        lambda parser: parser.add_argument("folder", type=Path),
        _summary,
    ),
)

if __name__ == "__main__":
    sys.exit(call(make_parser(COMMANDS, "python -m benchmarks.gpu_summary", __doc__)))
