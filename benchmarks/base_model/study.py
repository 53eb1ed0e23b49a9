"""The command `pretrain`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core import arguments as read
from ..core.command import Command, Study
from .pretrain import PretrainConfig, pretrain


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--minutes", type=read.positive, help="length of the run; the learning rate reaches 0 at its end"
    )
    length.add_argument("--steps", type=read.positive_int, help="length in steps, which repeats exactly")
    parser.add_argument("--batch-size", type=read.positive_int)
    parser.add_argument("--seed", type=read.whole)
    parser.add_argument("--threads", type=read.positive_int)


def _run(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("minutes", "steps", "batch_size", "seed", "threads")}
    config = PretrainConfig(**{name: value for name, value in given.items() if value is not None})
    record = pretrain(config, arguments.out)
    loss = record["heldout_loss_nats_per_token"]
    print(f"held-out loss {loss:.4f} nats per token; written to {arguments.out}")


STUDY = Study((Command("pretrain", "train the base model again from nothing", _add_arguments, _run),))
