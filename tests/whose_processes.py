"""One of two processes of which only some train together.

`whose_processes.py RANK PROCESSES FOLDER` runs every scenario, and writes what it ended with to FOLDER.
"""

import os
import sys
import warnings
from pathlib import Path

import launch
import pairs
import torch
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grit_optim import GritOptimizer

ADAPTIVE = {"rank_budget_schedule": "adaptive", "rank_budget_steps": 4}


def seeds(rank, steps, first=0):
    """A process's own batches."""
    return range(100 * rank + first, 100 * rank + first + steps)


def train(model, optimizer, batches, average=False):
    """Steps on the batches; with ``average`` the user averages the gradients over the processes."""
    for seed in batches:
        optimizer.zero_grad()
        pairs.loss_of(model, seed).backward()
        if average:
            launch.average(pairs.trained(model))
        optimizer.step()


def ended(model, optimizer):
    return {
        "weights": [p.detach().clone() for p in pairs.trained(model)],
        "state": optimizer.state_dict(),
        "steps": optimizer.telemetry()["steps"] if isinstance(optimizer, GritOptimizer) else 0,
    }


def separate(rank, processes):
    """Models of their own, for unequal numbers of steps: nobody waits for the others."""
    model = pairs.network()
    optimizer = pairs.wrapped(model)
    train(model, optimizer, seeds(rank, 3 + 2 * rank))
    return ended(model, optimizer)


def said(rank, processes):
    """As :func:`separate`, said by the user."""
    model = pairs.network()
    optimizer = pairs.wrapped(model, process_group=None)
    train(model, optimizer, seeds(rank, 3 + 2 * rank))
    return ended(model, optimizer)


def before(rank, processes, **options):
    """DDP around the model before the optimizer is built, which gets what is inside."""
    model = pairs.network()
    wrapped = DistributedDataParallel(model)
    optimizer = pairs.wrapped(model, **options)
    get_optimizer_state_dict(model, optimizer)  # has torch step with zeros
    train(wrapped, optimizer, seeds(rank, 4))
    return ended(model, optimizer)


def after(rank, processes):
    """DDP around the model after the optimizer, which torch has made step already, was built."""
    model = pairs.network()
    optimizer = pairs.wrapped(model)
    get_optimizer_state_dict(model, optimizer)
    train(DistributedDataParallel(model), optimizer, seeds(rank, 4))
    return ended(model, optimizer)


def alone_first(rank, processes):
    """DDP around the model after a step of each process alone, on equal rows."""
    model = pairs.network()
    optimizer = pairs.wrapped(model)
    train(model, optimizer, seeds(0, 1))
    train(DistributedDataParallel(model), optimizer, seeds(rank, 4))
    return ended(model, optimizer)


def averaged_by_hand(rank, processes):
    """The user averages the gradients, and says who takes part."""
    model = pairs.network()
    optimizer = pairs.wrapped(model, process_group=torch.distributed.group.WORLD)
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, seeds(rank, 4), average=True)
    return ended(model, optimizer)


def ignored(rank, processes, **options):
    """FSDP2 shares out the base and leaves all pairs alone, whose gradients the user averages."""
    model = pairs.network()
    fully_shard(model, ignored_params=set(pairs.trained(model)))
    optimizer = pairs.wrapped(model, **options)
    train(model, optimizer, seeds(rank, 4), average=True)
    return ended(model, optimizer)


def joined(rank, processes):
    """Uneven inputs; then all go on together."""
    model = pairs.network()
    wrapped = DistributedDataParallel(model)
    optimizer = pairs.wrapped(
        model, reprojection="balanced", reprojection_freq=3, rank_budget=0.7, **ADAPTIVE
    )
    with Join([wrapped, optimizer]):
        train(wrapped, optimizer, seeds(rank, 3 + 2 * rank))
    with Join([wrapped, optimizer]):
        train(wrapped, optimizer, seeds(rank, 2, first=50))
    return ended(model, optimizer)


def joined_without(rank, processes, plain=False):
    """Uneven inputs under a Join that knows the model alone."""
    model = pairs.network()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(pairs.trained(model), lr=1e-2) if plain else pairs.wrapped(model)
    with Join([wrapped]):
        train(wrapped, optimizer, seeds(rank, 3 + 2 * rank))
    return ended(model, optimizer)


def died(rank, processes):
    """The last process is gone in the middle of a run: what torch says of that is raised by the step."""
    model = pairs.network()
    optimizer = pairs.wrapped(model, process_group=torch.distributed.group.WORLD, capture="taps")
    train(model, optimizer, seeds(rank, 2))
    if rank == processes - 1:
        return {"error": None}
    try:
        train(model, optimizer, seeds(rank, 2))
    except RuntimeError as error:
        return {"error": f"{type(error).__module__}.{type(error).__name__}: {error}"}
    return {"error": "none"}


SCENARIOS = {
    "separate": separate,
    "said": said,
    "before": before,
    "after": after,
    "alone first": alone_first,
    "by hand": averaged_by_hand,
    "DDP, None": lambda rank, processes: before(rank, processes, process_group=None),
    "ignored": ignored,
    "ignored, said": lambda *where: ignored(*where, process_group=torch.distributed.group.WORLD),
    "Join": joined,
    "Join without": joined_without,
    "Join, AdamW": lambda rank, processes: joined_without(rank, processes, plain=True),
    "died": died,  # nobody talks to anybody after it
}


def run(rank, processes):
    found = {}
    for name, scenario in SCENARIOS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[name] = scenario(rank, processes)
        found[name]["warnings"] = [str(w.message) for w in caught if "Grit" in str(w.message)]
    return found


if __name__ == "__main__":
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    launch.join(folder, rank, processes)
    torch.save(run(rank, processes), folder / f"{rank}.pt")
    os._exit(0)
