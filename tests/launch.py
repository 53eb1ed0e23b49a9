"""Run one of the scripts of the tests in several processes that can talk to each other."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch

LOADED = (
    "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.distributed.algorithms.join",
    "transformers.models.llama.modeling_llama", "transformers.trainer", "peft", "accelerate", "grit_optim",
)  # fmt: skip
"""Modules that are imported once for the processes of all tests, which are forked from there."""


def context():
    """Forks from a process that has imported a lot and run nothing; where there is none, all import anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(list(LOADED))
    return forking


def start(script, processes, folder, *more):
    """`SCRIPT RANK PROCESSES FOLDER MORE…` once for each rank."""
    started = []
    for rank in range(processes):
        argv = [str(script), str(rank), str(processes), str(folder), *more]
        settings = (argv, str(folder / f"{rank}.log"), dict(os.environ))
        started.append(context().Process(target=_run, args=settings, daemon=True))
        started[-1].start()
    return started


def _run(argv, log, environment):
    """In a process of its own: run the script as its command would."""
    os.environ.clear()
    os.environ.update(environment)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no name has to resolve
    os.chdir(Path(argv[0]).parent)
    sys.path[:0] = [str(Path(argv[0]).parent)]
    sys.argv[:] = argv
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 2)
        runpy.run_path(argv[0], run_name="__main__")


def ends(started, folder):
    """What each process has left, once all have ended well."""
    try:
        for process in started:
            process.join(timeout=300)
        ended = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(len(started))]
    assert ended == [0] * len(started), "\n".join(logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(started))]


def tensors(value):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def join(folder, rank, processes):
    """In a script: set up the group of all processes, as torchrun and the Trainer's environment say it."""
    here = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }
    os.environ.update({name: str(value) for name, value in here.items()})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=processes
    )


def average(parameters):
    """In a script: what DDP does to gradients, for those that it does not know of."""
    for p in parameters:
        torch.distributed.all_reduce(p.grad)
        p.grad /= torch.distributed.get_world_size()
