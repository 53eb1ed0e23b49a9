"""The curvature of the main job, recorded while it trains: `python -m benchmarks.curvature --out DIR`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..core.results import RunConfig

LOG = {"every": 10, "log_fisher_spectrum": True, "log_top_eigs": 16, "log_eig_heatmaps": True}
HEATMAPS = 2


def record(folder: Path, config: RunConfig, threads: int) -> Path:
    """Train one run of GRIT with telemetry; returns the file of its records."""
    import torch
    from tqdm import tqdm

    from ..base_model.load import load_tokenizer
    from ..core import memory
    from ..tasks import load_task
    from ..training.train import Run

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Record the README's run: the main job's task, rate and seed with the default GRIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=RunConfig.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    print(record(given.out, RunConfig("naming", "grit", 1e-2, 0, steps=given.steps), given.threads))


if __name__ == "__main__":
    main()
