"""What an optimizer's step costs on a task against plain AdamW, in turns on equal batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.files import BenchmarkError
from ..core.results import RunConfig, finite
from ..core.settings import REFERENCE
from ..tasks.registry import PLAIN, Given
from ..tasks.task import Task
from ..training.optimizers import check_optimizer, state_bytes
from ..training.train import Run
from . import results
from .stages import stage_seconds
from .timing import abba, prepare, quartiles

BLOCK = (
    5  # steps in a row; blocks alternate as ABBA, so that a drift of the machine's speed falls on both alike
)
PLAIN_LR = 5e-3  # AdamW's own: at another method's rate it may diverge, and then its times say nothing
WARMUP = 10  # untimed steps of each: first allocations, and the samples that curvature waits for


def measure(config: RunConfig, task: Task, steps: int, given: Given = PLAIN) -> dict[str, Any]:
    """Time `steps` full training steps of AdamW and of the optimizer: forward, backward, update."""
    plain = replace(
        config, optimizer=REFERENCE, lr=PLAIN_LR, beta1=RunConfig.beta1, beta2=RunConfig.beta2, options={}
    )
    lanes = [Run(plain, task, given), Run(config, task, given)]
    for lane in lanes:
        lane.prepare()
        for _ in range(WARMUP):
            lane.train_step()
    before = stage_seconds(lanes[1].optimizer)
    blocks = [min(BLOCK, steps - start) for start in range(0, steps, BLOCK)]
    for place, turn in enumerate(abba(len(blocks))):
        for _ in range(blocks[place // 2]):
            lanes[turn].train_step()
    for lane in lanes:
        if any(finite(loss) is None for loss in lane.losses):
            raise BenchmarkError(
                f"{lane.config.optimizer} at learning rate {lane.config.lr:g} diverged while it was timed, "
                "and the times of a diverged run say nothing; choose a lower --lr"
            )
    spent = {
        name: seconds - before.get(name, 0.0) for name, seconds in stage_seconds(lanes[1].optimizer).items()
    }
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


def cost(
    config: RunConfig,
    steps: int,
    path: Path,
    threads: int | None = None,
    given: Given = PLAIN,
    **about: Any,
) -> dict[str, Any]:
    """Time `steps` steps of an optimizer and of plain AdamW; write the result and print a table.

    `config` gives task, optimizer and its settings; its length is not used. `threads` is torch's, by default
    all cores; `given` is base model and data; `about` is written into the result as it is.
    """
    load, task = prepare(threads), given.task(config.task)
    result = {
        "model": config.base,
        "task": config.task,
        "optimizer": check_optimizer(config.optimizer),
        "betas": [config.beta1, config.beta2],
        "options": config.options,
        "timed_steps": steps,
        "learning_rate": config.lr,
        **measure(replace(config, steps=steps + WARMUP), task, steps, given),
        **results.surroundings(config.optimizer, config.device, load),
        **about,
    }
    results.write(result, path)
    return result
