"""Held-out loss against bytes of the saved adapter: ways to get a small adapter, one JSON file for each run.

Every loss is measured on the adapter as ``PeftModel.from_pretrained`` reads it back from its file. Batches,
steps, schedule and seed are equal for all ways. The command line gives the rates and β₁; the report keeps the
best rate of each way.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..base_model.load import load_base_model, load_tokenizer
from ..core import environment, memory, packing
from ..core.files import BenchmarkError, write_json
from ..core.results import RunConfig, finite
from ..tasks.objective import evaluate
from ..tasks.registry import load_task
from ..training.train import autocast, data_fingerprint, in_precision
from .job import Job, Saved
from .peers import PEER_WAYS
from .ways import OWN_WAYS

FORMAT, KIND = 2, "sizes"
WAYS: dict[str, Callable[[Job], Saved]] = {**OWN_WAYS, **PEER_WAYS}
"""All ways by the names that the command takes."""


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
    """A run for each combination, seeds outermost; cuts of one whole adapter share one run."""
    sets = [tuple(budgets)] if budgets else []
    return [
        replace(
            template, optimizer=way, lr=lr, seed=seed, options={**template.options, "budgets": list(shares)}
        )
        for seed, way, lr in itertools.product(seeds, ways, lrs)
        for shares in (sets if way == "whole" else [(budget,) for budget in budgets])
    ]


def result_path(folder: Path, config: RunConfig) -> Path:
    """The path of a run's results file."""
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
    """Carry out every run that the folder does not hold yet, and write a results file for each."""
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise BenchmarkError(f"unknown way {unknown[0]!r}; known: {', '.join(WAYS)}")
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
            points = run(job, WAYS[config.optimizer])
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
