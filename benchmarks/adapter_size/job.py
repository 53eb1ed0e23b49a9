"""What every way to a small adapter is given, and the training that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from grit_optim import GritOptimizer

from ..core.files import BenchmarkError
from ..core.results import RunConfig
from ..core.settings import trainable
from ..tasks.objective import answer_loss, collate
from ..tasks.task import Task
from ..training.train import autocast, learning_rate_scale

Saved = Iterator[tuple[str, float | None, Path]]  # way, budget, folder of the adapter


@dataclass(frozen=True)
class Job:
    """What a way is given: the run, the budgets, the task.

    Attributes:
        config: the run's configuration.
        options: keywords for GRIT, on top of the way's own.
        budgets: shares of the whole adapter.
        task: what is trained.
        folder: where adapters are saved.
    """

    config: RunConfig
    options: dict[str, Any]
    budgets: tuple[float, ...]
    task: Task
    folder: Path

    def rank(self, budget: float) -> int:
        """The rank whose adapter is nearest to a share of the whole one; 0.49 of rank 16 gives 8, half."""
        return max(1, round(self.config.rank * budget))


def fit(
    job: Job,
    model: Any,
    optimizer: torch.optim.Optimizer,
    extra_loss: Callable[[], torch.Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train a model for the run's steps, on the batches that every way gets."""
    config = job.config
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_scale(step, config.steps, config.warmup)
    )
    batches = job.task.batches(config.seed, config.batch_size)
    model.train()
    for step in trange(
        config.steps, desc=f"{config.optimizer} {config.task} seed {config.seed}", unit="step"
    ):
        batch = collate(next(batches)).to(config.device)
        with autocast(config):
            loss = answer_loss(model, batch)
        (loss if extra_loss is None else loss + extra_loss()).backward()
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step)
        optimizer.zero_grad()


def adamw(config: RunConfig, model: Any) -> torch.optim.Optimizer:
    """AdamW over the adapter with the run's rate and betas."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(trainable(model), lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def grit(job: Job, model: Any, **options: Any) -> Any:
    """GRIT around :func:`adamw`, with the way's options and on top of them the job's."""
    try:
        return GritOptimizer(adamw(job.config, model), model, **{**options, **job.options})
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"GRIT cannot be built with --option as given: {error}") from error


def train_and_save(job: Job, model: Any, name: str, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Train a model with GRIT and save its adapter, as it is or rounded, under a name in the job's folder."""
    optimizer = grit(job, model, **options)
    fit(job, model, optimizer)
    optimizer.save_adapter(job.folder / name, dtype=dtype)
    return job.folder / name
