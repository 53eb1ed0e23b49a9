"""The command `pretrain`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core import arguments as read
from ..core.command import Command, Study
from ..core.files import BenchmarkError
from .pretrain import PretrainConfig, pretrain
from .pretrain_vlm import VlmPretrainConfig, pretrain_vlm

MODELS = ("text", "vlm")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="text",
        help="text: the Llama, the default; vlm: the model that reads pictures, whose decoder it is",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=read.positive,
        help="length of the Llama's run; the learning rate reaches 0 at its end",
    )
    length.add_argument(
        "--steps",
        type=read.positive_int,
        help=f"length in steps, which repeats exactly; vlm: of its second part, by default "
        f"{VlmPretrainConfig.steps}",
    )
    parser.add_argument(
        "--encoder-steps",
        type=read.positive_int,
        help=f"vlm: length of its first part, by default {VlmPretrainConfig.encoder_steps}",
    )
    parser.add_argument("--batch-size", type=read.positive_int)
    parser.add_argument("--seed", type=read.whole)
    parser.add_argument("--threads", type=read.positive_int)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in (*names, "steps", "batch_size", "seed", "threads")}
    return {name: value for name, value in values.items() if value is not None}


def _run(arguments: argparse.Namespace) -> None:
    if arguments.model == "vlm":
        if arguments.minutes is not None:
            raise BenchmarkError("--minutes is for the Llama; the model that reads pictures takes --steps")
        config = VlmPretrainConfig(**_given(arguments, "encoder_steps"))
        record = pretrain_vlm(config, arguments.out)
        score = record["heldout_of_bf16_file"]
        print(
            f"held-out loss {score['loss']:.4f} nats per token, {score['exact_match']:.1%} of the names "
            f"right; written to {arguments.out}"
        )
        return
    if arguments.encoder_steps is not None:
        raise BenchmarkError("--encoder-steps is for --model vlm")
    record = pretrain(PretrainConfig(**_given(arguments, "minutes")), arguments.out)
    loss = record["heldout_loss_nats_per_token"]
    print(f"held-out loss {loss:.4f} nats per token; written to {arguments.out}")


STUDY = Study((Command("pretrain", "train a base model again from nothing", _add_arguments, _run),))
