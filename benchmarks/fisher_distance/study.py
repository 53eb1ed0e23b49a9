"""The command `fisher-distance`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..core import environment, packing
from ..core.command import Command, Study
from ..core.files import write_json, write_text
from ..core.results import RunConfig
from .dense import DAMPING
from .measure import measure
from .report import read, table

RESULT = "fisher.json"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10, help="training steps before the comparison")
    parser.add_argument("--examples", type=int, default=32, help="examples of the comparison's batch")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)


def _run(arguments: argparse.Namespace) -> None:
    """Measure, and write `fisher.json` and `fisher.md`."""
    torch.set_num_threads(arguments.threads)
    rank = arguments.rank
    config = RunConfig("naming", "grit", 1e-2, 0, steps=arguments.steps, rank=rank, alpha=rank, batch_size=16)
    result = {
        "rank": rank,
        "training_steps": arguments.steps,
        "examples": arguments.examples,
        "damping": DAMPING,
        **measure(config, arguments.examples),
        "versions": environment.versions(),
        "code": environment.commit(),
        "hardware": environment.hardware("cpu"),
    }
    write_json(arguments.out / RESULT, result)
    report(arguments.out)


def report(folder: Path) -> None:
    """Write `fisher.md` and print it."""
    text = table(read(folder / RESULT))
    write_text(folder / "fisher.md", text)
    print(text)


DISTANCE = Command(
    "fisher-distance",
    "how far each Fisher approximation is from the dense per-token one",
    _add_arguments,
    _run,
    "The embedded model with an adapter that is trained for a few steps: some of its sites, thousands of "
    "answer tokens, all in float64.",
)
STUDY = Study((DISTANCE,), lambda folder: packing.exists(folder / RESULT), report)
