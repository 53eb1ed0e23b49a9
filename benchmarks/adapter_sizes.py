"""Held-out loss against bytes of the saved adapter: ways to get a small adapter, one JSON file for each run.

Every loss is measured on the adapter as it was read back from its file by ``PeftModel.from_pretrained``.
Batches, steps, schedule and seed are the same for all ways; the rate and β₁ are what the command is given,
and searched for each way.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import environment, memory, packing
from .base_model import load_base_model, load_tokenizer
from .files import BenchmarkError, write_json
from .objective import answer_loss, collate, evaluate
from .results import RunConfig, finite
from .settings import trainable
from .tasks import Task, load_task
from .train import adapted_model, autocast, data_fingerprint, in_precision, learning_rate_scale

FORMAT, KIND = 2, "sizes"
WHOLE = "grit"
Saved = Iterator[tuple[str, float | None, Path]]  # way, budget, folder of the adapter


@dataclass(frozen=True)
class Job:
    """What a way is given.

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
        """The rank whose adapter is nearest to that share; at 0.49 a little more than the share, so no way has less."""
        return max(1, round(self.config.rank * budget))


def fit(
    job: Job,
    model: Any,
    optimizer: torch.optim.Optimizer,
    extra_loss: Callable[[], torch.Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """All training steps on the batches that every way sees."""
    from tqdm import trange

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
    from grit_optim import GritOptimizer

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


def whole_and_cut(job: Job) -> Saved:
    """GRIT without reduction; then that adapter cut, by SVD (peft's ``save_as_lora``) and by the predicted loss."""
    from peft.tuners.lora.conversion import save_as_lora

    model = adapted_model(job.config)
    optimizer = grit(job, model, min_lora_rank=0)  # which matters only for the cuts below
    fit(job, model, optimizer)
    optimizer.save_adapter(job.folder / WHOLE)
    yield WHOLE, 1.0, job.folder / WHOLE
    for budget in job.budgets:
        place = job.folder / f"svd-{budget}"
        save_as_lora(place, model, rank=job.rank(budget))
        yield "SVD after training (peft)", budget, place
    for budget in sorted(job.budgets, reverse=True):
        optimizer.reduce_ranks_(budget)
        place = job.folder / f"cut-{budget}"
        optimizer.save_adapter(place)
        yield "grit, cut after training", budget, place


def budget_options(steps: int, budget: float) -> dict[str, Any]:
    """GRIT's options for a budget that is approached from a third to five sixths of the run (see benchmarks/FINDINGS.md)."""
    return {
        "reprojection": "balanced",
        "reprojection_freq": max(1, steps // 12),
        "rank_budget": budget,
        "rank_adaptation_start_step": steps // 3,
        "rank_budget_steps": max(1, steps // 2),
        "min_lora_rank": 0,
    }


def budgeted(job: Job) -> Saved:
    """GRIT with a common budget, reached during training."""
    for budget in job.budgets:
        model = adapted_model(job.config)
        options = budget_options(job.config.steps, budget)
        yield "grit, rank_budget", budget, train_and_save(job, model, f"budget-{budget}", **options)


def smaller_rank(job: Job) -> Saved:
    """GRIT on an adapter that has a smaller rank from the start."""
    for budget in job.budgets:
        rank = job.rank(budget)
        model = adapted_model(replace(job.config, rank=rank, alpha=rank))
        yield "grit, smaller rank", budget, train_and_save(job, model, f"rank-{rank}")


def rounded(job: Job) -> Saved:
    """GRIT's adapter saved in bf16: the whole one at a budget of 1, else one that a budget has made smaller in training."""
    for budget in job.budgets:
        options = budget_options(job.config.steps, budget) if budget < 1 else {}
        place = train_and_save(job, adapted_model(job.config), f"rounded-{budget}", torch.bfloat16, **options)
        yield "grit, saved in bf16", budget, place


WAYS: dict[str, Callable[[Job], Saved]] = {
    "whole": whole_and_cut, "budget": budgeted, "rank": smaller_rank, "rounded": rounded,
}  # fmt: skip
"""GRIT's own ways; the peers' are in ``adapter_peers``."""


def measure(place: Path, job: Job) -> dict[str, Any]:
    """Bytes and held-out loss of a saved adapter, loaded into a base model of its own."""
    from peft import PeftModel

    config = job.config
    model = in_precision(PeftModel.from_pretrained(load_base_model()[0], str(place)), config).eval()
    with autocast(config):
        score = evaluate(model, job.task.heldout, device=config.device)
    return {
        "bytes": (place / "adapter_model.safetensors").stat().st_size,
        "config_bytes": (place / "adapter_config.json").stat().st_size,
        "parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
        "heldout": finite(score.loss),
    }


def run(job: Job, way: Callable[[Job], Saved]) -> list[dict[str, Any]]:
    """Train in one way, and measure every adapter that it saves."""
    points = []
    for name, budget, place in way(job):
        points.append({"way": name, "budget": budget, **measure(place, job)})
        share = "" if budget is None else f" {budget:g}"
        print(f"{name}{share}: {points[-1]['bytes']:,} bytes, loss {points[-1]['heldout']}")
    return points


def plan(
    template: RunConfig,
    ways: Sequence[str],
    budgets: Sequence[float],
    lrs: Sequence[float],
    seeds: Sequence[int],
) -> list[RunConfig]:
    """Every combination, seeds outermost; all cuts of one whole adapter are one run, all else is a run for each budget."""
    sets = [tuple(budgets)] if budgets else []
    return [
        replace(
            template, optimizer=way, lr=lr, seed=seed, options={**template.options, "budgets": list(shares)}
        )
        for seed, way, lr in itertools.product(seeds, ways, lrs)
        for shares in (sets if way == "whole" else [(budget,) for budget in budgets])
    ]


def result_path(folder: Path, config: RunConfig) -> Path:
    """One file for each run."""
    return folder / f"{KIND}-{config.file_name()}"


def adapter_sizes(
    template: RunConfig,
    ways: Sequence[str],
    budgets: Sequence[float],
    lrs: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    threads: int | None,
) -> None:
    """Run what the folder does not hold yet."""
    from .adapter_peers import PEER_WAYS

    known = {**WAYS, **PEER_WAYS}
    unknown = [way for way in ways if way not in known]
    if unknown:
        raise BenchmarkError(f"unknown way {unknown[0]!r}; known: {', '.join(known)}")
    if max(budgets) > 1:
        raise BenchmarkError(f"--budgets are shares of the whole adapter, up to 1; got {max(budgets):g}")
    if threads:
        torch.set_num_threads(threads)
    memory.keep_freed_memory()
    environment.warn_if_bf16_is_slow(template.precision, template.device)
    task = load_task(template.task, load_tokenizer())
    code, fingerprint = environment.commit(), data_fingerprint(task)
    for config in plan(template, ways, budgets, lrs, seeds):
        path = result_path(folder, config)
        if packing.exists(path):
            print(f"{path} is there already and is left as it is")
            continue
        begun = time.perf_counter()
        options = {name: value for name, value in config.options.items() if name != "budgets"}
        with tempfile.TemporaryDirectory() as temporary:
            job = Job(config, options, tuple(config.options["budgets"]), task, Path(temporary))
            points = run(job, known[config.optimizer])
        result = {
            "format": FORMAT,
            "kind": KIND,
            "config": asdict(config),
            "points": points,
            "wall_seconds": time.perf_counter() - begun,
            "fingerprint": fingerprint,
            "versions": environment.versions(),
            "code": code,
            "hardware": environment.hardware(config.device),
        }
        write_json(path, result)
