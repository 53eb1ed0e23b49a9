"""Plans runs, leaves out what is done, and carries out the rest, each in a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .files import BenchmarkError
from .optimizers import check_optimizer
from .results import RunConfig, is_done

if TYPE_CHECKING:
    from .tasks.external import DataOptions

_HEAVY = ["torch", "transformers", "peft", "benchmarks.train"]


def resolve_device(device: str) -> str:
    """`auto` as cuda where there is one, else cpu; cuda without one is an error."""
    import torch

    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device == "cuda" and not available:
        raise BenchmarkError("--device cuda: torch sees no CUDA device; use --device cpu")
    return device


def plan(template: RunConfig, optimizers: Sequence[str], lrs: Sequence[float], seeds: Sequence[int]) -> list[RunConfig]:
    """Every combination; seeds outermost, so that a job stopped half-way has all methods at the first seeds."""
    combinations = itertools.product(seeds, map(check_optimizer, optimizers), lrs)
    return [replace(template, optimizer=name, lr=lr, seed=seed) for seed, name, lr in combinations]


def pending(runs: Sequence[RunConfig], folder: Path, data: DataOptions | None = None) -> list[RunConfig]:
    """The runs that the folder does not hold yet; makes the task's data on the way and says what they leave out."""
    from .base_model import load_tokenizer
    from .tasks import load_task
    from .train import data_fingerprint

    task = load_task(runs[0].task, load_tokenizer(), data)
    if task.note:
        print(task.note)
    fingerprint = data_fingerprint(task)
    return [run for run in runs if not is_done(folder, run, fingerprint)]


def _child(config: RunConfig, folder: Path, threads: int, jobs: int, slot: int, data: DataOptions | None) -> Path:
    warnings.simplefilter("ignore", UserWarning)  # the parent has printed those about versions
    from .train import execute

    return execute(config, folder, threads, jobs, slot, data)


def _context() -> multiprocessing.context.BaseContext:
    """Processes forked from a clean server that has the libraries loaded; fresh ones where there is no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    return context


def execute_all(
    runs: Sequence[RunConfig], folder: Path, jobs: int, threads: int | None = None, data: DataOptions | None = None
) -> list[str]:
    """Carry out runs, `jobs` at a time; returns a line for each that failed.

    A process per run: peak memory is the run's own, and nothing that one optimizer changed can reach the next.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    context, failures = _context(), list[str]()
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def in_fresh_process(config: RunConfig) -> Path:
        """Carry out one run in a process of its own; returns its result's path."""
        slot = slots.get()
        try:
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                return executor.submit(_child, config, folder, threads, jobs, slot, data).result()
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[Path], RunConfig] = {pool.submit(in_fresh_process, run): run for run in runs}
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    failures.append(f"{futures[future].file_name()}: {type(error).__name__}: {error}")
                    print(f"failed: {failures[-1]}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def run_all(
    runs: Sequence[RunConfig],
    folder: Path,
    jobs: int = 1,
    threads: int | None = None,
    data: DataOptions | None = None,
) -> None:
    """Carry out what is pending; an error at the end if a run failed (diverging is a result, not a failure)."""
    todo = pending(runs, folder, data)
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are in {folder} already and are left as they are")
    failures = execute_all(todo, folder, jobs, threads, data) if todo else []
    if failures:
        raise BenchmarkError(f"{len(failures)} of {len(todo)} runs failed:\n" + "\n".join(failures))
