"""Other people's ways to a small adapter, which GRIT's are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from grit_optim import export_adapter, presets
from grit_optim.rank import moves
from grit_optim.rank.selection import RankPolicy

from ..base_model.load import load_base_model
from ..core.files import BenchmarkError
from ..core.settings import trainable
from ..tasks.objective import collate
from ..training.train import LORA_TARGETS, adapted_model, autocast, in_precision
from .job import Job, Saved, adamw, fit, grit, train_and_save

TAU, LEAST = 0.99, 4
"""The GRIT library's defaults: share of the energy that is kept, and the rank that always is."""


def adamw_smaller_rank(job: Job) -> Saved:
    """AdamW on an adapter that has a smaller rank from the start."""
    for budget in job.budgets:
        rank = job.rank(budget)
        model = adapted_model(replace(job.config, rank=rank, alpha=rank))
        fit(job, model, adamw(job.config, model))
        place = job.folder / f"adamw-{rank}"
        model.save_pretrained(str(place))
        yield "AdamW, smaller rank", budget, place


def eva(job: Job) -> Saved:
    """GRIT on an adapter whose ranks and start are EVA's (Paischer et al. 2024), by the inputs' variance."""
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
        model = in_precision(get_peft_model(load_base_model()[0], config), job.config)
        first = [
            collate(batch) for batch in islice(job.task.batches(job.config.seed, job.config.batch_size), 24)
        ]
        # Padding says nothing of the inputs. In a causal model the mask changes no other position.
        inputs = [{"input_ids": b.tokens, "attention_mask": (b.tokens != 0).long()} for b in first]
        with autocast(job.config):
            initialize_lora_eva_weights(model, inputs, show_progress_bar=False)
        # peft makes A in the precision of the frozen weights, which would halve its bytes.
        for parameter in trainable(model):
            parameter.data = parameter.data.float()
        yield "EVA (peft), grit", budget, train_and_save(job, model, f"eva-{budget}")


def adalora(job: Job) -> Saved:
    """AdaLoRA (peft) around AdamW: from 1.5 times the target rank, cut from 1/6 to 2/3 of the run."""
    from peft import AdaLoraConfig, get_peft_model

    steps = job.config.steps
    for budget in job.budgets:
        rank = job.rank(budget)
        torch.manual_seed(job.config.seed)
        config = AdaLoraConfig(
            init_r=rank + rank // 2, target_r=rank, lora_alpha=rank + rank // 2,
            target_modules=list(LORA_TARGETS),
            total_step=steps, tinit=steps // 6, tfinal=steps // 3, deltaT=1,
        )  # fmt: skip
        model: Any = in_precision(get_peft_model(load_base_model()[0], config), job.config)
        regularizer = partial(off_orthogonal, model, config.orth_reg_weight)
        fit(job, model, adamw(job.config, model), regularizer, model.update_and_allocate)
        place = job.folder / f"adalora-{budget}"
        model.save_pretrained(place)
        yield "AdaLoRA (peft), AdamW", budget, place


def off_orthogonal(model: Any, weight: float) -> torch.Tensor:
    """AdaLoRA's regularizer, which its ``forward`` adds only to losses that the model computes itself."""
    rows = [
        p if "lora_A" in n else p.T for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n
    ]
    return (
        weight
        * torch.stack([torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m)).to(m)) for m in rows]).mean()
    )


def _project(job: Job, name: str, options: dict[str, Any], fixed: int | None, tau: float | None) -> Saved:
    """Train with the paper's projections, project once more at the end, save the directions that are left.

    The projections leave A and B at their full size, and the file would be as large as without them: what is
    counted is the file of ``export_adapter(…, tolerance=1e-5)``, which writes the SVD of the projected ΔW.
    """
    model = adapted_model(job.config)
    optimizer = grit(job, model, **options)
    fit(job, model, optimizer)
    with torch.no_grad():
        for curvature in optimizer.curvature:
            moves.project(
                optimizer.base,
                curvature,
                RankPolicy(fixed, tau, LEAST),
                options["reprojection"] == "two_sided",
            )
    if fixed is not None and max(optimizer.ranks().values()) > fixed:
        raise BenchmarkError(
            f"{job.config.steps} steps are too few for the paper's rules, which look at one step in "
            f"{options.get('cov_update_freq', 1)}: its factors have too few samples to project; run more "
            "steps"
        )
    place = job.folder / f"paper-{fixed}"
    export_adapter(model, place, tolerance=1e-5)
    yield name, None if fixed is None else fixed / job.config.rank, place


def _projections(kind: str) -> Callable[[Job], Saved]:
    def projected(job: Job) -> Saved:
        """GRIT's default step with the paper's projections at a fixed k, from a sixth of the run on."""
        steps = job.config.steps
        for budget in job.budgets:
            options = {
                "reprojection": kind,
                "reprojection_k": job.rank(budget),
                "reprojection_freq": max(1, steps // 12),
                "reprojection_warmup_steps": steps // 6,
            }
            for _, _, place in _project(job, kind, options, job.rank(budget), None):
                yield f"grit, {kind.replace('_', '-')} projection (paper)", budget, place

    return projected


def paper(job: Job) -> Saved:
    """The GRIT paper's recipe with periods for a short run; its own rule decides the rank, not a budget."""
    steps = job.config.steps
    options = {
        **presets.PAPER,
        "cov_update_freq": 1,
        "kfac_update_freq": max(1, steps // 12),
        "reprojection_freq": max(1, steps // 12),
        "reprojection_warmup_steps": steps // 6,
        "rank_adaptation_start_step": steps // 6,
    }
    for _, _, place in _project(job, "paper", options, None, TAU):
        yield f"GRIT paper's recipe, τ = {TAU:g}", None, place


PEER_WAYS: dict[str, Callable[[Job], Saved]] = {
    "adamw-rank": adamw_smaller_rank,
    "eva": eva,
    "adalora": adalora,
    "two-sided": _projections("two_sided"),
    "one-sided": _projections("one_sided"),
    "paper": paper,
}
