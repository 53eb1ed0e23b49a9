"""Held-out loss against bytes of the saved adapter: ways to get a small adapter, one JSON file for each run.

Every loss is measured on the adapter as it was read back from its file by ``PeftModel.from_pretrained``. Settings that a way
does not have of its own (rate, batches, steps, schedule, seed) are the same for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import environment
from .base_model import load_base_model, load_tokenizer
from .files import BenchmarkError, write_json
from .objective import answer_loss, collate, evaluate
from .results import RunConfig, finite
from .settings import trainable
from .tasks import Task, load_task
from .train import LORA_TARGETS, adapted_model, data_fingerprint, learning_rate_scale

FORMAT, KIND = 1, "sizes"
WHOLE = "grit"
Saved = Iterator[tuple[str, float, Path]]  # way, budget, folder of the adapter


@dataclass(frozen=True)
class Job:
    """What a way is given: the run's configuration, the task, the budgets as shares of the whole adapter, a folder."""

    config: RunConfig
    task: Task
    budgets: tuple[float, ...]
    folder: Path

    def rank(self, budget: float) -> int:
        """The rank whose adapter has at most that share of the parameters."""
        return max(1, int(self.config.rank * budget))


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
    for step in trange(config.steps, desc=f"{config.optimizer} seed {config.seed}", unit="step"):
        loss = answer_loss(model, collate(next(batches)).to(config.device))
        (loss if extra_loss is None else loss + extra_loss()).backward()
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step)
        optimizer.zero_grad()


def _adamw(config: RunConfig, model: Any) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(trainable(model), lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def _grit(config: RunConfig, model: Any, **options: Any) -> Any:
    from grit_optim import GritOptimizer

    return GritOptimizer(_adamw(config, model), model, **options)


def _trained(job: Job, model: Any, name: str, **options: Any) -> Path:
    """Train a model with GRIT and save its adapter under a name in the job's folder."""
    optimizer = _grit(job.config, model, **options)
    fit(job, model, optimizer)
    optimizer.save_adapter(job.folder / name)
    return job.folder / name


def whole_and_cut(job: Job) -> Saved:
    """GRIT without reduction; then that adapter cut, by SVD (peft's ``save_as_lora``) and by the predicted loss."""
    from peft.tuners.lora.conversion import save_as_lora

    model = adapted_model(job.config)
    optimizer = _grit(job.config, model, min_lora_rank=0)  # which matters only for the cuts below
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
    """GRIT's options for a budget that is reached at two thirds of the run."""
    return {
        "reprojection": "balanced",
        "reprojection_freq": max(1, steps // 12),
        "rank_budget": budget,
        "rank_adaptation_start_step": steps // 6,
        "rank_budget_steps": max(1, steps // 2),
        "min_lora_rank": 0,
    }


def budgeted(job: Job) -> Saved:
    """GRIT with a common budget, reached during training."""
    for budget in job.budgets:
        model = adapted_model(job.config)
        options = budget_options(job.config.steps, budget)
        yield "grit, rank_budget", budget, _trained(job, model, f"budget-{budget}", **options)


def smaller_rank(job: Job) -> Saved:
    """GRIT on an adapter that has a smaller rank from the start."""
    for budget in job.budgets:
        rank = job.rank(budget)
        model = adapted_model(replace(job.config, rank=rank, alpha=rank))
        yield "grit, smaller rank", budget, _trained(job, model, f"rank-{rank}")


def eva(job: Job) -> Saved:
    """GRIT on an adapter whose ranks and start are EVA's (Paischer et al. 2024): shares of the inputs' variance."""
    from peft import EvaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    for budget in job.budgets:
        rank = job.rank(budget)
        torch.manual_seed(job.config.seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(LORA_TARGETS),
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=2.0),
        )
        model = get_peft_model(load_base_model()[0], config).to(job.config.device)
        first = [collate(batch) for batch in islice(job.task.batches(job.config.seed, job.config.batch_size), 24)]
        inputs = [{"input_ids": b.tokens, "attention_mask": (b.tokens != 0).long()} for b in first]
        initialize_lora_eva_weights(model, inputs, show_progress_bar=False)
        optimizer = _grit(job.config, model)
        fit(job, model, optimizer)
        place = job.folder / f"eva-{budget}"
        optimizer.save_adapter(place)
        yield "EVA (peft), grit", budget, place


def adalora(job: Job) -> Saved:
    """AdaLoRA (peft) around AdamW: 1.5 times the target rank at first, cut between a sixth and two thirds of the run."""
    from peft import AdaLoraConfig, get_peft_model

    steps = job.config.steps
    for budget in job.budgets:
        rank = job.rank(budget)
        torch.manual_seed(job.config.seed)
        config = AdaLoraConfig(
            init_r=rank + (rank + 1) // 2, target_r=rank, lora_alpha=rank + (rank + 1) // 2, target_modules=list(LORA_TARGETS),
            total_step=steps, tinit=steps // 6, tfinal=steps // 3, deltaT=1,
        )  # fmt: skip
        model: Any = get_peft_model(load_base_model()[0], config).to(job.config.device)
        regularizer = partial(_off_orthogonal, model, config.orth_reg_weight)
        fit(job, model, _adamw(job.config, model), regularizer, model.update_and_allocate)
        place = job.folder / f"adalora-{budget}"
        model.save_pretrained(place)
        yield "AdaLoRA (peft), AdamW", budget, place


def _off_orthogonal(model: Any, weight: float) -> torch.Tensor:
    """AdaLoRA's regularizer, which its ``forward`` adds only to losses that the model computes itself."""
    rows = [p if "lora_A" in n else p.T for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    return weight * torch.stack([torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m)).to(m)) for m in rows]).mean()


def paper(job: Job) -> Saved:
    """The GRIT paper's rules at a fixed k, projected once more at the end; only the directions that are left are saved."""
    from grit_optim import export_adapter, pairs, presets
    from grit_optim.rank import RankPolicy

    for budget in job.budgets:
        rank = job.rank(budget)
        options = {**presets.PAPER, "reprojection_k": rank, "enable_rank_adaptation": False}
        model = adapted_model(job.config)
        optimizer = _grit(job.config, model, **options)
        fit(job, model, optimizer)
        with torch.no_grad():
            for curvature in optimizer._curvatures:
                pairs.project(optimizer.base, curvature, RankPolicy(rank, None, 1))
        if max(optimizer.ranks().values()) > rank:
            raise BenchmarkError(
                f"{job.config.steps} steps are too few for the paper's rules, which look at one step in "
                f"{options['cov_update_freq']}: its factors have too few samples to project; run more steps"
            )
        place = job.folder / f"paper-{budget}"
        export_adapter(model, place, tolerance=1e-5)
        yield "GRIT paper, two-sided", budget, place


WAYS: dict[str, Callable[[Job], Saved]] = {
    "whole": whole_and_cut,
    "budget": budgeted,
    "rank": smaller_rank,
    "eva": eva,
    "adalora": adalora,
    "paper": paper,
}


def measure(place: Path, task: Task, device: str) -> dict[str, Any]:
    """Bytes and held-out loss of a saved adapter, loaded into a base model of its own."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base_model()[0], str(place)).to(device).eval()
    weights = place / "adapter_model.safetensors"
    return {
        "bytes": weights.stat().st_size,
        "config_bytes": (place / "adapter_config.json").stat().st_size,
        "parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
        "heldout": finite(evaluate(model, task.heldout, device=device).loss),
    }


def result_path(folder: Path, config: RunConfig, way: str, budgets: Sequence[float]) -> Path:
    """One file for each way, seed, length and set of budgets."""
    shares = "-".join(f"{budget:g}" for budget in budgets)
    return folder / f"{KIND}-{config.task}-{way}-{shares}-steps{config.steps}-seed{config.seed}.json"


def adapter_sizes(
    config: RunConfig,
    ways: Sequence[str],
    budgets: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    threads: int | None,
) -> None:
    """Run what the folder does not hold yet; seeds outermost."""
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise BenchmarkError(f"unknown way {unknown[0]!r}; known: {', '.join(WAYS)}")
    if max(budgets) > 1:
        raise BenchmarkError(f"--budgets are shares of the whole adapter, up to 1; got {max(budgets):g}")
    if threads:
        torch.set_num_threads(threads)
    task = load_task(config.task, load_tokenizer())
    code, fingerprint = environment.commit(), data_fingerprint(task)
    for seed in seeds:
        for way in ways:
            run = replace(config, seed=seed, optimizer=way)
            path = result_path(folder, run, way, budgets)
            if path.exists():
                print(f"{path} is there already and is left as it is")
                continue
            with tempfile.TemporaryDirectory() as temporary:
                job = Job(run, task, tuple(budgets), Path(temporary))
                points = [
                    {"way": name, "budget": budget, **measure(place, task, config.device)}
                    for name, budget, place in WAYS[way](job)
                ]
            for point in points:
                print(f"{point['way']} {point['budget']:g}: {point['bytes']:,} bytes, loss {point['heldout']}")
            result = {
                "format": FORMAT,
                "kind": KIND,
                "config": asdict(run),
                "points": points,
                "fingerprint": fingerprint,
                "versions": environment.versions(),
                "code": code,
                "hardware": environment.hardware(config.device),
            }
            write_json(path, result)
