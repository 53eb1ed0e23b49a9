"""Plans runs, leaves out what is done, and carries out the rest, each in a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..core import environment
from ..core.files import BenchmarkError
from ..core.results import RunConfig, is_done
from ..tasks.registry import PLAIN, Given
from .optimizers import check_optimizer
from .train import data_fingerprint, execute

T = TypeVar("T")
PRELOADED = ["torch", "transformers", "peft", "benchmarks.training.train"]


def plan(
    template: RunConfig, optimizers: Sequence[str], lrs: Sequence[float], seeds: Sequence[int]
) -> list[RunConfig]:
    """Every combination, seeds outermost: a job that is stopped has run all methods at the first seeds."""
    combinations = itertools.product(seeds, map(check_optimizer, optimizers), lrs)
    return [replace(template, optimizer=name, lr=lr, seed=seed) for seed, name, lr in combinations]


@cache
def fingerprint(task: str, given: Given = PLAIN) -> str:
    """What identifies the task's data and the base model. Makes the data and prints what they leave out."""
    loaded = given.task(task)
    if loaded.note:
        print(loaded.note)
    return data_fingerprint(loaded, given.source)


def pending(runs: Sequence[RunConfig], folder: Path, given: Given = PLAIN) -> list[RunConfig]:
    """The runs that the folder does not hold yet; makes the tasks' data on the way."""
    return [run for run in runs if not is_done(folder, run, fingerprint(run.task, given))]


def _child(config: RunConfig, folder: Path, threads: int, jobs: int, slot: int, given: Given) -> Path:
    warnings.simplefilter("ignore", UserWarning)  # the parent has printed those about versions
    return execute(config, folder, threads, jobs, slot, given)


def _context() -> multiprocessing.context.BaseContext:
    """Processes forked from a server that has the libraries loaded; fresh ones where there is no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def threads_per_run(jobs: int, threads: int | None = None) -> int:
    """Threads of one of `jobs` runs at a time: `threads`, or an equal share of the cores."""
    return threads or max(1, (os.cpu_count() or 1) // jobs)


def _end_with_parent() -> None:
    """End this process when its parent ends; a parent that is killed cannot stop its runs itself."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        """Wait for the parent's end; the thread that trains would notice it only after its last step."""
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_process(call: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a fresh process, which ends when this one ends."""
    with ProcessPoolExecutor(1, mp_context=_context(), initializer=_end_with_parent) as executor:
        return executor.submit(call, *arguments).result()


def execute_all(
    runs: Sequence[RunConfig],
    folder: Path,
    jobs: int,
    threads: int | None = None,
    given: Given = PLAIN,
) -> dict[str, str]:
    """Carry out runs, `jobs` at a time; returns what went wrong with each that failed, by its result's name.

    A process per run: peak memory is the run's own, and nothing that one optimizer changed can reach the
    next.
    """
    for precision, device in sorted({(run.precision, run.device) for run in runs}):
        environment.warn_if_bf16_is_slow(precision, device)
    share, failures = threads_per_run(jobs, threads), dict[str, str]()
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def in_fresh_process(config: RunConfig) -> Path:
        """Carry out one run in a process of its own; returns its result's path."""
        slot = slots.get()
        try:
            return in_process(_child, config, folder, share, jobs, slot, given)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[Path], RunConfig] = {pool.submit(in_fresh_process, run): run for run in runs}
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    name = futures[future].file_name()
                    failures[name] = f"{type(error).__name__}: {error}"
                    print(f"failed: {name}: {failures[name]}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def run_all(
    runs: Sequence[RunConfig],
    folder: Path,
    jobs: int = 1,
    threads: int | None = None,
    given: Given = PLAIN,
) -> None:
    """Carry out what is pending; an error at the end if a run failed (a diverged run is a result)."""
    todo = pending(runs, folder, given)
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are in {folder} already and are left as they are")
    failures = execute_all(todo, folder, jobs, threads, given) if todo else {}
    if failures:
        lines = [f"{name}: {error}" for name, error in failures.items()]
        raise BenchmarkError(f"{len(failures)} of {len(todo)} runs failed:\n" + "\n".join(lines))
