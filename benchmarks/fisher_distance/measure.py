"""Trains an adapter of the embedded model for a few steps, and measures at some of its sites."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from grit_optim import GritOptimizer
from grit_optim.lora.discovery import find_sites

from ..base_model.load import load_tokenizer
from ..core.results import RunConfig
from ..tasks.objective import answer_loss, collate
from ..tasks.registry import load_task
from ..training.train import Run
from .dense import measure_site

SITES = ("layers.0.self_attn.q_proj", "layers.2.self_attn.v_proj")


def step_seconds(model: Any, batch: Any, fisher: str, steps: int = 6) -> float:
    """Median processor seconds of one GritOptimizer step ("inverse", refreshed at every step)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = GritOptimizer(torch.optim.SGD(trained, lr=0.0), model, precondition="inverse", fisher=fisher)
    seconds = []
    for _ in range(steps):
        answer_loss(model, batch).backward()
        begun = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - begun)
        optimizer.zero_grad()
    optimizer.close()
    return statistics.median(seconds[2:])


def measure(config: RunConfig, examples: int) -> dict[str, Any]:
    """Train an adapter, then compare on one large batch; returns rows and times."""
    run = Run(config, load_task(config.task, load_tokenizer()))
    for _ in range(config.steps):
        run.train_step()
    kinds = ("kfac", "block_diagonal", "diagonal", "ekfac")
    assert isinstance(run.optimizer, GritOptimizer)
    run.optimizer.close()
    small = collate(list(run.task.heldout[: config.batch_size]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads would count as work
    seconds = {kind: step_seconds(run.model, small, kind) for kind in kinds}
    torch.set_num_threads(threads)
    model, batch = run.model.double(), collate(list(run.task.train[-examples:]))
    found = find_sites(model, model.parameters())[0]
    chosen = [site for site in found if any(part in site.name for part in SITES)]
    rows = [
        row for site in chosen for row in measure_site(site, lambda: answer_loss(model, batch).backward())
    ]
    return {"rows": rows, "step_seconds": seconds}
