"""GRIT's own ways to a small adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..training.train import adapted_model
from .job import Job, Saved, fit, grit, train_and_save

WHOLE = "grit"  # the whole adapter, which every other one is compared with


def whole_and_cut(job: Job) -> Saved:
    """GRIT's whole adapter; then its cuts, by SVD (peft's ``save_as_lora``) and by the predicted loss."""
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
    """GRIT's options for a budget that is reached from a third to five sixths of the run."""
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
    """GRIT's adapter saved in bf16; at a budget below 1 the run has made it smaller before."""
    for budget in job.budgets:
        options = budget_options(job.config.steps, budget) if budget < 1 else {}
        place = train_and_save(job, adapted_model(job.config), f"rounded-{budget}", torch.bfloat16, **options)
        yield "grit, saved in bf16", budget, place


OWN_WAYS: dict[str, Callable[[Job], Saved]] = {
    "whole": whole_and_cut, "budget": budgeted, "rank": smaller_rank, "rounded": rounded,
}  # fmt: skip
"""GRIT's own ways by the names that the command takes."""
