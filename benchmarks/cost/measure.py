"""What an optimizer's step costs against plain AdamW: both in one process, in turns, on the same batches."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import environment
from ..core.files import BenchmarkError, write_json
from ..core.results import RunConfig, finite
from ..core.settings import Settings
from ..tasks import check_task
from ..training.optimizers import check_optimizer, package_version, state_bytes
from .shapes import Workload

if TYPE_CHECKING:
    from .compare import Plan

EMBEDDED, REFERENCE = "embedded", "adamw"

BLOCK = (
    5  # steps in a row; blocks alternate as ABBA, so that a drift of the machine's speed falls on both alike
)
PLAIN_LR = 5e-3  # AdamW's own: at another method's rate it may diverge, and then its times say nothing
SHAPE_LR = 1e-4  # for models of random weights, whose losses mean nothing: low enough for none to diverge
WARMUP = 10  # untimed steps of each: first allocations, and the samples that curvature waits for


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"q1": low, "median": middle, "q3": high}


def abba(blocks: int) -> list[int]:
    """The order of `2 * blocks` blocks: 0, 1, 1, 0, 0, 1, 1, 0, ..."""
    return [lane for pair in range(blocks) for lane in ((0, 1) if pair % 2 == 0 else (1, 0))]


def stages(optimizer: Any) -> dict[str, float]:
    """Host seconds per stage so far; empty for an optimizer that does not count them."""
    return dict(optimizer.stage_seconds()) if hasattr(optimizer, "stage_seconds") else {}


def measure(config: RunConfig, task: Any, steps: int) -> dict[str, Any]:
    """Time `steps` full training steps (forward, backward, optimizer) of AdamW and of the configured optimizer."""
    from ..training.train import Run

    plain = replace(
        config, optimizer="adamw", lr=PLAIN_LR, beta1=RunConfig.beta1, beta2=RunConfig.beta2, options={}
    )
    lanes = [Run(plain, task), Run(config, task)]
    for lane in lanes:
        for _ in range(WARMUP):
            lane.train_step()
    before = stages(lanes[1].optimizer)
    blocks = [min(BLOCK, steps - start) for start in range(0, steps, BLOCK)]
    for place, turn in enumerate(abba(len(blocks))):
        for _ in range(blocks[place // 2]):
            lanes[turn].train_step()
    for lane in lanes:
        if any(finite(loss) is None for loss in lane.losses):
            raise BenchmarkError(
                f"{lane.config.optimizer} at learning rate {lane.config.lr:g} diverged while it was timed, and the times of a "
                "diverged run say nothing; choose a lower --lr"
            )
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in stages(lanes[1].optimizer).items()}
    adamw, other = (lane.step_seconds[WARMUP:] for lane in lanes)
    return {
        "reference": "plain adamw",
        "step_seconds": {"plain adamw": quartiles(adamw), "optimizer": quartiles(other)},
        "ratio": quartiles([mine / theirs for mine, theirs in zip(other, adamw, strict=True)]),
        "ratio_of_totals": sum(other) / sum(adamw),
        "stage_seconds_per_step": {name: seconds / steps for name, seconds in spent.items()},
        "optimizer_state_bytes": {
            "plain adamw": state_bytes(lanes[0].optimizer.state_dict()),
            "optimizer": state_bytes(lanes[1].optimizer.state_dict()),
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print a result as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    what = f"task {result['task']}" if result.get("task") else result["model"]
    table = Table("", "step, ms (quartiles)", "optimizer state", title=f"full training steps, {what}")
    for name, times in result["step_seconds"].items():
        spread = f"{1e3 * times['median']:.1f} ({1e3 * times['q1']:.1f} to {1e3 * times['q3']:.1f})"
        table.add_row(
            result["optimizer"] if name == "optimizer" else name,
            spread,
            f"{result['optimizer_state_bytes'][name]:,} bytes",
        )
    console.print(table)
    ratio = result["ratio"]
    console.print(
        f"step by step: {ratio['median']:.3f}× (quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f}); "
        f"all steps together: {result['ratio_of_totals']:.3f}×"
    )
    if result["stage_seconds_per_step"]:
        table = Table("stage, ms", "host, mean of a step", "device")
        on_device = result.get("stage_device_seconds", {})
        for name, seconds in result["stage_seconds_per_step"].items():
            table.add_row(
                name, f"{1e3 * seconds:.2f}", f"{1e3 * on_device[name]:.2f}" if name in on_device else "–"
            )
        console.print(table)


def prepare(threads: int | None) -> float:
    """Settle threads and memory; returns the machine's load, near 0 on a quiet one, else the times are worth little."""
    import torch

    from ..core import memory

    memory.keep_freed_memory()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    return os.getloadavg()[0]


def surroundings(optimizer: str, device: str, load: float) -> dict[str, Any]:
    """What a result depends on besides its settings."""
    return {
        "versions": environment.versions(),
        "optimizer_package": package_version(optimizer),
        "code": environment.commit(),
        "hardware": {**environment.hardware(device), "load_average_before": load},
    }


def _write(result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
    show(result)
    print(f"written: {path}")


def cost(
    config: RunConfig, steps: int, path: Path, threads: int | None = None, **about: Any
) -> dict[str, Any]:
    """Measure an optimizer's step against plain AdamW with `steps` timed steps each; write the result and print a table.

    `config` gives task, optimizer and its settings; its length is not used. `threads` is torch's, by default
    all cores; `about` is written into the result as it is.
    """
    from ..base_model.load import load_tokenizer
    from ..tasks import load_task

    load = prepare(threads)
    result = {
        "model": EMBEDDED,
        "task": check_task(config.task),
        "optimizer": check_optimizer(config.optimizer),
        "betas": [config.beta1, config.beta2],
        "options": config.options,
        "timed_steps": steps,
        "learning_rate": config.lr,
        **measure(replace(config, steps=steps + WARMUP), load_task(config.task, load_tokenizer()), steps),
        **surroundings(config.optimizer, config.device, load),
        **about,
    }
    _write(result, path)
    return result


def cost_on_shape(
    workload: Workload,
    optimizers: Sequence[str],
    plan: Plan,
    folder: Path,
    lr: float = SHAPE_LR,
    base: str = REFERENCE,
    threads: int | None = None,
) -> dict[str, str]:
    """Measure optimizers on a model of random weights that they share, against plain `base`; a file for each of them.

    Returns:
        What went wrong, by optimizer; the others have their files all the same.

    Raises:
        BenchmarkError: plain `base` itself failed, so that there is nothing to compare with.
    """
    from .compare import compare
    from .lanes import Shared

    for name in optimizers:
        check_optimizer(name)
    load = prepare(threads)
    names = list(dict.fromkeys([base, *optimizers]))
    outcome = compare(Shared(workload), names, lambda name: Settings(lr, base=base), plan)
    if base not in outcome.results:
        raise BenchmarkError(
            f"plain {base} failed, so there is nothing to compare with: {outcome.failures[base]}"
        )
    for name, found in outcome.results.items():
        result = {
            "model": workload.label(),
            "workload": asdict(workload),
            "betas": list(Settings.betas),
            "options": {},
            "learning_rate": lr,
            **found,
            **surroundings(name, workload.device, load),
            "failures": outcome.failures,
        }
        over = "" if base == REFERENCE or name == base else f"-over-{base}"
        if name != base or len(names) == 1:
            _write(result, folder / f"cost-{workload.label()}-{name}{over}.json")
    return outcome.failures
