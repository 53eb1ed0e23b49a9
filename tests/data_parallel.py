"""One of several processes that train a tiny model together.

`data_parallel.py RANK PROCESSES FOLDER` runs every scenario. Each process takes its rows of every
batch, and writes what it ended with to FOLDER. One process alone runs the scenarios with the whole batch.
"""

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

import around
import launch
import support
import tiny
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grit_optim import GritOptimizer, Site, presets

BUDGET = {
    "reprojection": "balanced",
    "reprojection_freq": 2,
    "rank_budget": 0.5,
    "rank_budget_steps": 4,
    "min_lora_rank": 0,
    "precondition": "inverse",
}
# name: options of GritOptimizer, under which processes together are one process with all of their rows
OPTIONS = {
    "spectral": {},
    "steer": {"precondition": "steer"},
    "eigenbasis": {"precondition": "eigenbasis"},
    "balanced": {"precondition": "balanced", "kfac_update_freq": 2},
    "inverse": {"precondition": "inverse"},
    "absolute": {
        "precondition": "inverse",
        "damping": "absolute",
        "kfac_damping": 1e-3,
        "step_length": "natural",
    },
    "in every second step": {"precondition": "inverse", "cov_update_freq": 2},
    "mean over all tokens": {"precondition": "inverse", "fisher_decay": None},
    "block_diagonal": {"precondition": "inverse", "fisher": "block_diagonal"},
    "ekfac": {"precondition": "inverse", "fisher": "ekfac"},
    "from gradients": {"capture": "gradients"},
    "budget": BUDGET,
    "adaptive budget": {**BUDGET, "rank_budget_schedule": "adaptive"},
    "regrowth": {**BUDGET, "rank_budget": (0.4, 0.9)},
    "two-sided": {
        "precondition": "inverse",
        "reprojection": "two_sided",
        "reprojection_freq": 3,
        "reprojection_k": 2,
    },
    "penalties": {"precondition": "inverse", "lambda_kfac": 1e-2, "lambda_reproj": 1e-2, "reprojection_k": 2},
    "adaptive schedule": {"precondition": "inverse", "adaptive_schedule": True, "kfac_update_freq": 4},
    "paper": {**presets.PAPER, "kfac_update_freq": 2, "reprojection_freq": 3, "kfac_min_samples": 8},
}
STEPS = {"adaptive schedule": 33}


EPS = 1e-4
"""Adam's, as large as the gradients. A smaller one makes rounding errors of tiny gradients whole steps."""


def grit(model, **options):
    """GritOptimizer over AdamW, ready after one step that carries information."""
    return GritOptimizer(tiny.adamw(model, eps=EPS), model, **{"kfac_min_samples": 8, **options})


def llama():
    """A Llama without q_proj and k_proj adapted.

    The gradient of a sequence's first token is zero there but for rounding, and whether it is exactly zero,
    which decides whether the token counts, differs with the size of the batch.
    """
    return tiny.llama(target_modules=["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]).double()


def ended(model, optimizer):
    """What a scenario leaves behind."""
    told = optimizer.telemetry()
    return {
        "weights": tiny.weights(model),
        "products": {site.name: site.b.detach() @ site.a.detach() for site in support.sites(optimizer)},
        "state": optimizer.state_dict(),
        "ranks": dict(optimizer.ranks()),
        "told": {
            key: told[key]
            for key in ("steps", "folds", "dropped_folds", "predicted_cost", "sites_by_gradients")
        },
        "in force": {key: told[key] for key in ("kfac_update_freq", "reprojection_freq", "kfac_damping")},
        "steps that are still compared": support.parts(optimizer).capture.watch.steps_left,
    }


def rows(seed, rank, processes):
    """This process's share of a batch."""
    return tiny.tokens(seed).chunk(processes)[rank]


def together(model, **kwargs):
    """The model as DDP wraps it where there are several processes."""
    return DistributedDataParallel(model, **kwargs) if torch.distributed.is_initialized() else model


def train(model, optimizer, rank, processes, steps, first=0):
    """A loop over this process's rows."""
    for seed in range(first, first + steps):
        ids = rows(seed, rank, processes)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def options_of(name, rank, processes):
    """A Llama trained under the options of that name."""
    model = llama()
    optimizer = grit(model, **OPTIONS[name])
    wrapped = together(
        model, gradient_as_bucket_view=True
    )  # gradients are views then, which modes that turn them replace
    train(wrapped, optimizer, rank, processes, STEPS.get(name, 8))
    return ended(model, optimizer)


def accumulated(rank, processes):
    """Two micro-batches a step; only the second one is averaged."""
    model = llama()
    optimizer = grit(model, precondition="inverse")
    wrapped = together(model)
    for seed in range(8):
        ids = rows(seed, rank, processes)
        with wrapped.no_sync() if processes > 1 and seed % 2 == 0 else contextlib.nullcontext():
            wrapped(input_ids=ids, labels=ids).loss.backward()
        if seed % 2:
            optimizer.step()
            optimizer.zero_grad()
    return ended(model, optimizer)


def resumed(rank, processes):
    """Half of a run, saved, and the other half by another optimizer."""
    model = llama()
    optimizer = grit(model, **BUDGET)
    wrapped = together(model)
    train(wrapped, optimizer, rank, processes, 4)
    saved = optimizer.state_dict()
    optimizer.close()
    again = grit(model, **BUDGET)
    again.load_state_dict(saved)
    train(wrapped, again, rank, processes, 4, first=4)
    return ended(model, again)


class Experts(nn.Module):
    """Two hand-written pairs, of which a call uses those that it is told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([tiny.HandWritten(), tiny.HandWritten()])

    def forward(self, x, used):
        return sum(self.experts[i](x).square().mean() for i in used)


def experts(rank, processes):
    """The second pair sees tokens of the last process alone, and in two steps of nobody."""
    model = Experts().double()
    sites = [Site.from_modules(f"{i}", e.down, e.up, e.scaling) for i, e in enumerate(model.experts)]
    optimizer = GritOptimizer(
        tiny.adamw(model, eps=EPS),
        model,
        sites=sites,
        kfac_min_samples=2,
        precondition="inverse",
        fisher_decay=None,
    )
    wrapped = together(model, find_unused_parameters=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        x = torch.randn(max(processes, 2), 5, 6, generator=generator, dtype=torch.double)
        own = x[rank]
        if processes == 1:  # the same mean of two losses
            loss = (model(x[0], [0]) + model(x[1], [0, 1] if step % 4 else [0])) / 2
        else:
            loss = wrapped(own, [0, 1] if rank == processes - 1 and step % 4 else [0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ended(model, optimizer)


def overflow(rank, processes):
    """One process's loss is infinite in one step."""
    model = llama()
    optimizer = grit(model)
    wrapped = together(model)
    for seed in range(6):
        ids = rows(seed, rank, processes)
        factor = float("inf") if seed == 3 and rank == processes - 1 else 1.0
        (wrapped(input_ids=ids, labels=ids).loss * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ended(model, optimizer)


def resting(rank, processes):
    """Steps without a backward pass, as torch.distributed.checkpoint takes one."""
    model = llama()
    optimizer = grit(model)
    wrapped = together(model)
    train(wrapped, optimizer, rank, processes, 3)
    before = ended(model, optimizer)["told"]
    optimizer.step()
    return {**ended(model, optimizer), "before": before}


def unseen(rank, processes):
    """A layer that reads the adapter's weights and never calls its modules."""
    model = llama()
    around.go_around_the_tap(around.layer_of(model, "layers.0.self_attn.v_proj"))
    optimizer = grit(model)
    train(together(model), optimizer, rank, processes, 8)
    return ended(model, optimizer)


def trainer(rank, processes):
    """transformers' Trainer, which wraps the model and shares the batches out itself."""
    from transformers import Trainer, TrainingArguments

    model = llama()
    optimizer = grit(model)
    examples = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=24)]
    with tempfile.TemporaryDirectory() as out:
        shared = {"ddp_backend": "gloo"} if processes > 1 else {}
        arguments = TrainingArguments(
            out,
            max_steps=6,
            per_device_train_batch_size=4 // processes,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            **shared,
        )
        Trainer(model, arguments, train_dataset=examples, optimizers=(optimizer, None)).train()
    return ended(model, optimizer)


SCENARIOS = {
    **{name: (lambda rank, processes, name=name: options_of(name, rank, processes)) for name in OPTIONS},
    "accumulated": accumulated,
    "resumed": resumed,
    "experts": experts,
    "overflow": overflow,
    "resting": resting,
    "around": unseen,
    "Trainer": trainer,
}


def run(rank, processes):
    """Every scenario's end, with the warnings that it gave."""
    torch.set_num_threads(1)
    found = {}
    for name, scenario in SCENARIOS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[name] = scenario(rank, processes)
        found[name]["warnings"] = [
            str(w.message) for w in caught if "GRIT" in str(w.message) or "taps" in str(w.message)
        ]
    return found


if __name__ == "__main__":
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    launch.join(folder, rank, processes)
    torch.save(run(rank, processes), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
