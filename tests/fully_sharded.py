"""One of several processes that train a tiny model under FSDP2.

`fully_sharded.py RANK PROCESSES FOLDER` runs every scenario. Each process takes its rows of every batch, and
writes what it ended with to FOLDER. One process alone runs the scenarios with the whole batch, unwrapped.
"""

import os
import sys
import warnings
from pathlib import Path

import data_parallel
import launch
import pairs
import support
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

BUDGET = data_parallel.BUDGET
# name: options of GritOptimizer, under which processes together are one process with all of their rows
OPTIONS = {
    name: data_parallel.OPTIONS[name]
    for name in (
        "spectral", "steer", "eigenbasis", "balanced", "block_diagonal", "ekfac", "from gradients", "budget",
        "adaptive budget", "regrowth", "two-sided", "penalties",
    )
}  # fmt: skip
OPTIONS |= {
    "inverse": {"precondition": "inverse", "max_grad_norm": 0.1},
    "none": {"precondition": "none"},
    "diagonal": {"precondition": "inverse", "fisher": "diagonal"},
}
AS_DDP = ("eigenbasis", "balanced", "ekfac")  # where no norm decides
ROWS = 8
EPS = 1e-4


def network():
    return pairs.network(rank=5).double()  # over 2 and 4 processes: 3 + 2, and 2 + 2 + 1 + 0 rows


def shard(model, **how):
    """The layers on their own, and what is left."""
    if torch.distributed.is_initialized():
        layers = model.get_base_model()
        for part in (layers.first, layers.second, model):
            fully_shard(part, **how)
    return model


def grit(model, **options):
    return pairs.wrapped(model, settings={"lr": 1e-2, "eps": EPS}, **options)


def batch(seed, rank, processes):
    """This process's rows, and what they are to become."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.double)
    return x.chunk(processes)[rank]


def loss_of(model, seed, rank, processes):
    return model(batch(seed, rank, processes)).square().mean()


def train(model, optimizer, rank, processes, steps=8, first=0, before=lambda: None):
    for seed in range(first, first + steps):
        loss = loss_of(model, seed, rank, processes)
        optimizer.observe(loss.detach())
        loss.backward()
        before()
        optimizer.step()
        optimizer.zero_grad()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ended(model, optimizer):
    told = optimizer.telemetry()
    state = optimizer.state_dict()
    return {
        "weights": {n: full(p.detach()) for n, p in model.named_parameters() if p.requires_grad},
        "own": state["grit"],
        "moments": [{k: full(v) for k, v in s.items()} for s in state["state"].values()],
        "ranks": dict(optimizer.ranks()),
        "told": {k: told[k] for k in ("steps", "folds", "engaged_sites", "sites_by_gradients")},
        "left": support.parts(optimizer).capture.watch.steps_left,
    }


def trained(model, rank, processes, **options):
    """How a run of eight steps ends."""
    optimizer = grit(model, **options)
    train(model, optimizer, rank, processes)
    return ended(model, optimizer)


def options_of(name, rank, processes):
    return trained(shard(network()), rank, processes, **OPTIONS[name])


def as_ddp(name, rank, processes):
    """The options of that name under DDP, whose processes have all of A and B."""
    model = network()
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    optimizer = grit(model, **OPTIONS[name])
    train(wrapped, optimizer, rank, processes)
    return ended(model, optimizer)


def accumulated(rank, processes):
    """Two micro-batches a step; only the second one is reduced."""
    model = shard(network())
    optimizer = grit(model)
    for seed in range(8):
        if processes > 1:
            model.set_requires_gradient_sync(seed % 2 == 1)
        (loss_of(model, seed, rank, processes) / 2).backward()
        if seed % 2:
            optimizer.step()
            optimizer.zero_grad()
    return ended(model, optimizer)


def clipped(rank, processes):
    model = shard(network())
    optimizer = grit(model)
    clip = lambda: torch.nn.utils.clip_grad_norm_(pairs.trained(model), 0.05)  # noqa: E731
    train(model, optimizer, rank, processes, before=clip)
    return ended(model, optimizer)


def evaluated(rank, processes):
    """Evaluation in between, after which FSDP2 leaves whole matrices in the modules, and questions then."""
    model = shard(network())
    optimizer = grit(model)
    for step in range(4):
        train(model, optimizer, rank, processes, 1, step)
        with torch.no_grad():
            loss_of(model, 99, rank, processes)
        optimizer.ranks()
    return ended(model, optimizer)


def built_before(rank, processes):
    """Sharded after the optimizer was built, whose groups get the new parameters, as Accelerate does it."""
    model = network()
    optimizer = grit(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shard(model)
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[name] for name in names]
    train(model, optimizer, rank, processes)
    return ended(model, optimizer)


def mixed(rank, processes):
    """Gathered copies, h and δ in bf16; shards in fp32."""
    model = pairs.network(rank=5)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = grit(model)
    for seed in range(4):
        model(batch(seed, rank, processes).float()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return ended(model, optimizer)


def replicas(rank, processes):
    """HSDP: with two processes, two replicas; with four, two of two shards."""
    how = {}
    if processes > 1:
        how["mesh"] = init_device_mesh("cpu", (2, processes // 2), mesh_dim_names=("replicas", "shards"))
    return trained(shard(network(), **how), rank, processes)


def by_columns(rank, processes):
    """B is shared out over its columns, which are its rank."""
    model = pairs.network(rank=4).double()
    of_b = {p for n, p in model.named_parameters() if "lora_B" in n}
    shard(model, shard_placement_fn=lambda p: Shard(1) if p in of_b else None)
    return trained(model, rank, processes)


def one_direction(rank, processes):
    """Rank 1: of four processes one has all of A."""
    return trained(shard(pairs.network(rank=1).double()), rank, processes)


def ignored(rank, processes):
    """FSDP2 leaves the second pair alone, whose gradients are averaged by hand."""
    model = network()
    left = [p for n, p in model.named_parameters() if "second" in n]
    shard(model, ignored_params=set(left))
    optimizer = grit(model)

    def average():
        launch.average(p for p in left if p.requires_grad and processes > 1)

    train(model, optimizer, rank, processes, before=average)
    return ended(model, optimizer)


def cleared(rank, processes, set_to_none=True):
    """Passes whose gradients are cleared do not count."""
    model = shard(network())
    optimizer = grit(model)
    for step in range(4):
        loss_of(model, 90 + step, rank, processes).backward()
        model.zero_grad(set_to_none)
        train(model, optimizer, rank, processes, 1, step)
    return ended(model, optimizer)


def saved(folder, rank, processes, name="eigenbasis"):
    """Four steps, saved by name; and how the run goes on, to the numbers of its own processes."""
    model = shard(network())
    optimizer = grit(model, **OPTIONS[name])
    train(model, optimizer, rank, processes, 4)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / f"saved by {processes}", no_dist=processes == 1)
    train(model, optimizer, rank, processes, 3, first=4)
    return ended(model, optimizer)


def loaded(folder, by, rank, processes, name="eigenbasis"):
    """What ``by`` processes have saved, and three steps more."""
    model = shard(network())
    optimizer = grit(model, **OPTIONS[name])
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / f"saved by {by}", no_dist=processes == 1)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, rank, processes, 3, first=4)
    return ended(model, optimizer)


def exported(folder, rank, processes):
    """An adapter of reduced ranks, saved by all together; and what cannot be done."""
    model = shard(network())
    optimizer = grit(model, **BUDGET)
    train(model, optimizer, rank, processes)
    report = optimizer.save_adapter(folder / f"adapter of {processes}")
    said = None
    try:
        optimizer.shrink_() if processes > 1 else None
    except ValueError as error:
        said = str(error)
    loss_of(model, 0, rank, processes).backward()
    reports = [(r.name, r.status) for r in optimizer.check_capture()]
    return {"ranks": dict(report), "said": said, "reports": reports, **ended(model, optimizer)}


SCENARIOS = {
    **{name: (lambda rank, processes, name=name: options_of(name, rank, processes)) for name in OPTIONS},
    **{f"{name}, DDP": (lambda rank, processes, name=name: as_ddp(name, rank, processes)) for name in AS_DDP},
    "accumulated": accumulated,
    "clipped": clipped,
    "evaluated": evaluated,
    "built before": built_before,
    "mixed precision": mixed,
    "replicas": replicas,
    "cleared": cleared,
    "zeroed": lambda rank, processes: cleared(rank, processes, set_to_none=False),
    "ignored": ignored,
    "rank 1": one_direction,
    "by columns": by_columns,
}


def run(rank, processes, folder):
    """Every scenario's end, with the warnings that it gave."""
    found = {}
    in_files = {
        "saved": lambda rank, processes: saved(folder, rank, processes),
        "loaded": lambda rank, processes: loaded(folder, processes, rank, processes),
        "exported": lambda rank, processes: exported(folder, rank, processes),
    }
    if processes == 4:
        in_files["loaded from two"] = lambda rank, processes: loaded(folder, 2, rank, processes)
    for name, scenario in {**SCENARIOS, **in_files}.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[name] = scenario(rank, processes)
        found[name]["warnings"] = [
            str(w.message) for w in caught if any(word in str(w.message) for word in ("GRIT", "Grit", "taps"))
        ]
    return found


if __name__ == "__main__":
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    launch.join(folder, rank, processes)
    torch.save(run(rank, processes, folder), folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)
