"""Command line: `python -m benchmarks COMMAND`; `--help` names the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import arguments as read
from . import cost_arguments, packing, suite_arguments
from .files import REPOSITORY, BenchmarkError
from .finetune import arguments as finetune_arguments
from .optimizers import OPTIMIZERS, check_optimizer
from .results import PRECISIONS, RunConfig
from .tasks import TASKS, check_task
from .tasks.external import DATA, MAX_LENGTH, DataOptions, check_data

MAIN_LRS, MAIN_OPTIMIZERS = [5e-3, 1e-2, 2e-2], ["adamw", "grit"]  # the best lies between the others
_OPTIMIZER_HELP = f"known: {', '.join(OPTIMIZERS)}"


def _pretrain(arguments: argparse.Namespace) -> None:
    from .pretrain import PretrainConfig, pretrain

    given = {name: getattr(arguments, name) for name in ("minutes", "steps", "batch_size", "seed", "threads")}
    record = pretrain(PretrainConfig(**{k: v for k, v in given.items() if v is not None}), arguments.out)
    print(
        f"held-out loss {record['heldout_loss_nats_per_token']:.4f} nats per token; written to {arguments.out}"
    )


def _template(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that all runs of the command share; optimizer, rate and seed are filled in by the plan."""
    from .runner import resolve_device

    names = (
        "steps",
        "batch_size",
        "rank",
        "alpha",
        "beta1",
        "beta2",
        "weight_decay",
        "warmup",
        "eval_every",
        "precision",
    )
    values = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    values.setdefault("alpha", values.get("rank", RunConfig.rank))
    device, options = resolve_device(arguments.device), dict(arguments.option or [])
    task = check_data(arguments.data[0]) if arguments.data else check_task(arguments.task or "naming")
    return RunConfig(task, "", 0.0, 0, device=device, options=options, **values)


def _data(arguments: argparse.Namespace) -> DataOptions | None:
    """Where external data come from; None for an embedded task."""
    if arguments.data:
        return DataOptions(arguments.data[1], arguments.max_length or MAX_LENGTH)
    if arguments.max_length:
        raise BenchmarkError("--max-length is for --data; the embedded tasks have lengths of their own")
    return None


def _run(arguments: argparse.Namespace) -> None:
    from .runner import plan, run_all

    suite_arguments.check(arguments)
    if arguments.suite:
        suite_arguments.run(arguments)
    else:
        data = _data(arguments)
        runs = plan(_template(arguments), arguments.optimizers, arguments.lrs, arguments.seeds or [0])
        run_all(runs, arguments.out, arguments.jobs, arguments.threads, data)
    print(f"results in {arguments.out}; table and figures: python -m benchmarks report {arguments.out}")


def _report(arguments: argparse.Namespace) -> None:
    from . import adapter_sizes_report, cost_report, truncation_report
    from .finetune import report as finetune_report
    from .report import report

    for kind in (truncation_report, adapter_sizes_report, cost_report, finetune_report):
        if kind.is_folder(arguments.folder):
            kind.report(arguments.folder)
            return
    report(arguments.folder)


def _truncation(arguments: argparse.Namespace) -> None:
    from .runner import resolve_device
    from .truncation import truncation

    device, options = resolve_device(arguments.device), dict(arguments.option or [])
    task, optimizer = check_task(arguments.task), check_optimizer(arguments.optimizer)
    config = RunConfig(
        task, optimizer, arguments.lr, arguments.seed, arguments.steps, device=device, options=options,
        eval_every=arguments.steps,
    )  # fmt: skip
    path = truncation(
        config, arguments.batches, arguments.drops, arguments.budgets, arguments.out, arguments.threads
    )
    print(f"written: {path}; table and figure: python -m benchmarks report {arguments.out}")


def _tasks(arguments: argparse.Namespace) -> None:
    from .tasks.describe import describe

    describe([check_task(name) for name in arguments.task])


def _main(arguments: argparse.Namespace) -> None:
    from .report import report
    from .runner import plan, resolve_device, run_all

    template = RunConfig("naming", "", 0.0, 0, steps=arguments.steps, device=resolve_device(arguments.device))
    run_all(plan(template, MAIN_OPTIMIZERS, MAIN_LRS, [0]), arguments.out)
    report(arguments.out)


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("pretrain", help="train the base model again from nothing")
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--minutes", type=read.positive, help="length of the run; the learning rate reaches 0 at its end"
    )
    length.add_argument(
        "--steps", type=read.positive_int, help="the same, counted in steps (repeatable exactly)"
    )
    parser.add_argument("--batch-size", type=read.positive_int)
    parser.add_argument("--seed", type=read.whole)
    parser.add_argument("--threads", type=read.positive_int)
    parser.set_defaults(call=_pretrain)


def _add_run(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("run", help="train LoRA with several optimizers, learning rates and seeds")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--task", help=f"known: {', '.join(TASKS)}; by default naming")
    what.add_argument(
        "--data",
        type=read.data,
        metavar="NAME[=FOLDER]",
        help=f"public data instead of a task: the hub's copy, or NAME_train.jsonl and NAME_test.jsonl in FOLDER; "
        f"known: {', '.join(DATA)}",
    )
    parser.add_argument(
        "--max-length",
        type=read.positive_int,
        help=f"tokens of prompt and answer of --data, by default {MAX_LENGTH}; longer examples are left out and counted",
    )
    parser.add_argument("--optimizers", type=read.several(str), help=_OPTIMIZER_HELP)
    parser.add_argument("--lrs", type=read.several(read.positive))
    parser.add_argument("--seeds", type=read.several(read.whole), help="by default 0")
    parser.add_argument("--out", type=Path, required=True)
    for name, kind in (
        ("steps", read.positive_int),
        ("batch-size", read.positive_int),
        ("rank", read.positive_int),
    ):
        parser.add_argument(
            f"--{name}", type=kind, help=f"by default {getattr(RunConfig, name.replace('-', '_'))}"
        )
    parser.add_argument("--alpha", type=read.positive_int, help="LoRA's alpha; the rank by default")
    for name, check in (("beta1", read.beta), ("beta2", read.beta), ("weight-decay", read.not_negative)):
        parser.add_argument(
            f"--{name}", type=check, help=f"by default {getattr(RunConfig, name.replace('-', '_'))}"
        )
    parser.add_argument("--warmup", type=read.whole, help=f"steps, by default {RunConfig.warmup}")
    parser.add_argument(
        "--eval-every", type=read.positive_int, help=f"steps, by default {RunConfig.eval_every}"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help=f"bf16: frozen weights in bf16, adapters in fp32, autocast; by default {RunConfig.precision}",
    )
    parser.add_argument("--option", type=read.option, action="append", metavar="KEY=VALUE")
    parser.add_argument(
        "--jobs", type=read.positive_int, default=1, help="runs at a time (times are then shared)"
    )
    parser.add_argument(
        "--threads", type=read.positive_int, help="torch threads per run; by default all, shared by jobs"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    suite_arguments.add(parser)
    parser.set_defaults(call=_run)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="table and figures from the results in a folder")
    parser.add_argument("folder", type=Path)
    parser.set_defaults(call=_report)


def _add_tasks(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tasks", help="sizes, lengths and the untrained base model's loss of embedded tasks"
    )
    parser.add_argument(
        "--task",
        type=read.several(str),
        default=sorted(TASKS),
        help=f"known: {', '.join(TASKS)}; by default all",
    )
    parser.set_defaults(call=_tasks)


def _add_truncation(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "truncation", help="what dropping directions of a trained adapter costs: predicted, and measured"
    )
    parser.add_argument("--task", default="naming", help=f"known: {', '.join(TASKS)}")
    parser.add_argument("--optimizer", default="grit", help=_OPTIMIZER_HELP)
    parser.add_argument("--lr", type=read.positive, default=1e-2)
    parser.add_argument("--seed", type=read.whole, default=0)
    parser.add_argument("--steps", type=read.positive_int, default=RunConfig.steps)
    parser.add_argument(
        "--batches", type=read.positive_int, default=12, help="fresh training batches for the factors"
    )
    parser.add_argument(
        "--drops",
        type=read.several(read.positive_int),
        default=[1, 2, 4, 8, 12],
        help="directions dropped per site",
    )
    parser.add_argument(
        "--budgets",
        type=read.several(read.positive),
        default=[0.75, 0.5, 0.35, 0.25],
        help="shares of the parameters",
    )
    parser.add_argument("--option", type=read.option, action="append", metavar="KEY=VALUE")
    parser.add_argument("--threads", type=read.positive_int)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(call=_truncation)


def _sizes(arguments: argparse.Namespace) -> None:
    from .adapter_sizes import adapter_sizes
    from .runner import resolve_device

    config = RunConfig(
        check_task(arguments.task), "", 0.0, 0, arguments.steps, beta1=arguments.beta1, eval_every=arguments.steps,
        device=resolve_device(arguments.device), precision=arguments.precision, options=dict(arguments.option or []),
    )  # fmt: skip
    given = (getattr(arguments, name) for name in ("ways", "budgets", "lrs", "seeds", "out", "threads"))
    adapter_sizes(config, *given)
    print(f"results in {arguments.out}; table and figure: python -m benchmarks report {arguments.out}")


def _add_sizes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sizes", help="held-out loss against bytes of the saved adapter, several ways"
    )
    parser.add_argument("--task", default="naming", help=f"known: {', '.join(TASKS)}")
    parser.add_argument(
        "--ways",
        type=read.several(str),
        default=[
            "whole",
            "budget",
            "rank",
            "adamw-rank",
            "eva",
            "adalora",
            "two-sided",
            "one-sided",
            "paper",
        ],
        help="by default all: whole (GRIT, and the same cut by SVD and by predicted loss), budget, rank, adamw-rank, eva, "
        "adalora, two-sided, one-sided, paper; and rounded: saved in bf16, at a budget of 1 the whole adapter",
    )
    parser.add_argument(
        "--budgets",
        type=read.several(read.positive),
        default=[0.75, 0.49, 0.25],
        help="shares of the whole adapter",
    )
    parser.add_argument("--seeds", type=read.several(read.whole), default=[0, 1, 2])
    parser.add_argument(
        "--lrs", type=read.several(read.positive), default=[1e-2], help="report keeps each way's best"
    )
    parser.add_argument("--beta1", type=read.beta, default=RunConfig.beta1)
    parser.add_argument("--steps", type=read.positive_int, default=RunConfig.steps)
    parser.add_argument("--precision", choices=PRECISIONS, default=RunConfig.precision)
    parser.add_argument("--option", type=read.option, action="append", metavar="KEY=VALUE", help="for GRIT")
    parser.add_argument("--threads", type=read.positive_int)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(call=_sizes)


def _add_main(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "main", help="the comparison in the README: AdamW against GRIT, a few minutes"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "main")
    parser.add_argument("--steps", type=read.positive_int, default=RunConfig.steps)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.set_defaults(call=_main)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_pretrain,
        _add_run,
        _add_report,
        packing.add,
        _add_tasks,
        cost_arguments.add,
        _add_truncation,
        _add_sizes,
        _add_main,
    ):
        add(commands)
    finetune_arguments.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.call(arguments)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(
            str(stop) or "stopped; what is finished is kept, the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
