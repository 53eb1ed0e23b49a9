"""The commands `cost` and `count`, and the report of a folder of costs."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from ..core import arguments as read
from ..core.command import Command, Study
from ..core.environment import resolve_device
from ..core.files import REPOSITORY, BenchmarkError
from ..core.results import RunConfig
from ..core.settings import REFERENCE
from ..tasks.registry import TASKS, check_task
from ..training.optimizers import OPTIMIZERS, check_optimizer
from .compare import Plan
from .count import KIND, count
from .on_shape import cost_on_shape
from .on_task import cost
from .report import holds, report
from .scaling import Sweep, scale
from .shapes import QUANTIZATIONS, SHAPE_LR, SHAPES, Workload, check_model
from .traffic import TRAFFIC

EMBEDDED_STEPS, EMBEDDED_LR, SHAPE_STEPS, BLOCK = 80, 5e-3, 20, 5
_WORKLOAD = ("quantize", "rank", "layers", "batch_size", "length", "accumulation", "checkpointing")
_SHAPE_ONLY = (*_WORKLOAD, "base", "trace", "block", "seconds", "scale", "scale_tokens", "scale_layers")
TOKENS, LAYERS = (512, 1024, 2048, 4096), (2, 4, 8, 16)


def _add_workload(parser: argparse._ActionsContainer) -> None:
    """What is trained; None stands for a workload's own default."""
    for name, what in (
        ("rank", "LoRA's rank and alpha"),
        ("layers", "decoder layers, by default as many as the model has"),
        ("batch-size", "sequences per pass"),
        ("length", "tokens per sequence"),
        ("accumulation", "passes per step"),
    ):
        default = getattr(Workload, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=read.positive_int, help=what + (f", by default {default}" if default else "")
        )
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="recompute activations in the backward pass; by default it is done",
    )


def _workload(arguments: argparse.Namespace, device: str) -> Workload:
    given = {name: value for name in _WORKLOAD if (value := getattr(arguments, name, None)) is not None}
    return Workload(check_model(arguments.model), device=device, **given)


def _add_cost(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", help=f"for the embedded model; known: {', '.join(TASKS)}; by default naming"
    )
    parser.add_argument(
        "--model", default="embedded", help=f"known: embedded (the default), {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--optimizers", "--optimizer", dest="optimizers", type=read.several(str), default=["grit"],
        help=f"known: {', '.join(OPTIMIZERS)}; by default grit",
    )  # fmt: skip
    parser.add_argument(
        "--steps",
        type=read.positive_int,
        help=f"timed, of each; {EMBEDDED_STEPS}, with --model {SHAPE_STEPS}",
    )
    parser.add_argument(
        "--lr", type=read.positive, help=f"by default {EMBEDDED_LR:g}, with --model so low that none diverges"
    )
    parser.add_argument("--threads", type=read.positive_int)
    read.add_device(parser)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "cost")
    shape = parser.add_argument_group("with --model")
    _add_workload(shape)
    shape.add_argument(
        "--quantize", choices=QUANTIZATIONS, help="nf4: frozen linear layers in 4 bits (bitsandbytes)"
    )
    shape.add_argument(
        "--base",
        choices=["adamw", "adamw8bit"],
        help="what GRIT is put around and compared with; by default adamw",
    )
    shape.add_argument("--block", type=read.positive_int, help=f"timed steps in a row, by default {BLOCK}")
    shape.add_argument("--seconds", type=read.positive, help="begin no further pair of rounds after so long")
    shape.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="write a profiler's trace of one pass and step of each optimizer",
    )
    shape.add_argument(
        "--scale", action="store_true", default=None, help="vary tokens and layers; one file with all points"
    )
    lists = read.several(read.positive_int)
    for name, default in (("tokens", TOKENS), ("layers", LAYERS)):
        text = ",".join(map(str, default))
        shape.add_argument(f"--scale-{name}", type=lists, metavar="N,N", help=f"by default {text}")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _cost(arguments: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, _interrupt)  # a time limit (timeout, a scheduler) ends it as Ctrl-C does
    for name in arguments.optimizers:
        check_optimizer(name)
    if arguments.model == "embedded":
        _cost_embedded(arguments)
    else:
        _cost_on_shape(arguments)


def _cost_embedded(arguments: argparse.Namespace) -> None:
    for name in _SHAPE_ONLY:
        if getattr(arguments, name) is not None:
            raise BenchmarkError(
                f"{read.flag(name)} is for --model {' or '.join(SHAPES)}; the embedded model has a task"
            )
    task = check_task(arguments.task or "naming")
    lr, device = arguments.lr or EMBEDDED_LR, resolve_device(arguments.device)
    for name in arguments.optimizers:
        path = arguments.out / f"cost-{task}-{name}.json"
        cost(
            RunConfig(task, name, lr, 0, device=device),
            arguments.steps or EMBEDDED_STEPS,
            path,
            arguments.threads,
        )


def _cost_on_shape(arguments: argparse.Namespace) -> None:
    check_model(arguments.model)
    if arguments.task:
        raise BenchmarkError(
            "--task is for the embedded model; a model of random weights is given random tokens"
        )
    if arguments.scale is None and (arguments.scale_tokens or arguments.scale_layers):
        raise BenchmarkError("--scale-tokens and --scale-layers say what --scale varies; pass that too")
    workload = _workload(arguments, resolve_device(arguments.device))
    plan = Plan(arguments.steps or SHAPE_STEPS, arguments.seconds, arguments.trace, arguments.block or BLOCK)
    if arguments.scale:
        sweep = Sweep(arguments.scale_tokens or TOKENS, arguments.scale_layers or LAYERS)
        scale(workload, arguments.optimizers, sweep, plan, arguments.out, arguments.threads)
        return
    failures = cost_on_shape(
        workload, arguments.optimizers, plan, arguments.out,
        arguments.lr or SHAPE_LR, arguments.base or REFERENCE, arguments.threads,
    )  # fmt: skip
    if failures:
        lines = [f"{name}: {error}" for name, error in failures.items()]
        raise BenchmarkError(f"{len(failures)} optimizers failed; the others are done:\n" + "\n".join(lines))


def _add_count(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-3-8b-shape", help=f"known: {', '.join(SHAPES)}")
    parser.add_argument("--optimizer", default="grit", help=f"known: {', '.join(OPTIMIZERS)}")
    parser.add_argument("--option", type=read.option, action="append", metavar="KEY=VALUE")
    _add_workload(parser)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "cost")


def _count(arguments: argparse.Namespace) -> None:
    workload = _workload(arguments, "meta")
    name = f"{KIND}-{workload.label()}-{check_optimizer(arguments.optimizer)}.json"
    count(workload, arguments.optimizer, arguments.out / name, dict(arguments.option or []))


COST = Command(
    "cost",
    "step time, memory and kernels of optimizers against plain AdamW, in turns",
    _add_cost,
    _cost,
    "On the embedded model with a task's data, each optimizer on a model of its own; or, with --model, on a "
    "model of that shape with random weights, which all optimizers share.",
)
COUNT = Command(
    "count",
    "operations, bytes, kernels and memory of a step at a model's true shapes, without computing it",
    _add_count,
    _count,
)
STUDY = Study((COST, COUNT, TRAFFIC), holds, report)
