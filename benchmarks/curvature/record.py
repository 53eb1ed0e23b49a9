"""One run of GRIT with telemetry, its records written as JSON lines."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from ..base_model.load import load_tokenizer
from ..core import memory
from ..core.results import RunConfig
from ..tasks.registry import load_task
from ..training.train import Run

LOG = {"every": 10, "log_fisher_spectrum": True, "log_top_eigs": 16, "log_eig_heatmaps": True}
HEATMAPS = 2


def record(folder: Path, config: RunConfig, threads: int) -> Path:
    """Train one run of GRIT with telemetry; returns the file of its records."""
    memory.keep_freed_memory()
    torch.set_num_threads(threads)
    path = folder / f"{config.task}-{config.optimizer}.jsonl"
    path.unlink(missing_ok=True)
    run = Run(config, load_task(config.task, load_tokenizer()))
    run.optimizer.log_to(path, **LOG, log_eig_heatmaps_modules=HEATMAPS)  # type: ignore[attr-defined]
    for _ in tqdm(range(config.steps), unit="step"):
        run.train_step()
    run.optimizer.close()  # type: ignore[attr-defined]
    return path
