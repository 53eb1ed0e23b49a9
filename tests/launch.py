"""Run one of the scripts of the tests in several processes that can talk to each other."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def start(script, processes, folder, *more):
    """`SCRIPT RANK PROCESSES FOLDER MORE…` once for each rank."""
    here = {
        **os.environ,
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }  # no name has to resolve
    started = []
    for rank in range(processes):
        command = [sys.executable, str(script), str(rank), str(processes), str(folder), *more]
        with (folder / f"{rank}.log").open("w") as log:
            started.append(subprocess.Popen(command, cwd=Path(script).parent, env=here, stderr=log))
    return started


def ends(started, folder):
    """What each process has left, once all have ended well."""
    try:
        ended = [process.wait(timeout=300) for process in started]
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
