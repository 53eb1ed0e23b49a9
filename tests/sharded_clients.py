"""One of two processes in which a trainer shards the model: `sharded_clients.py RANK PROCESSES FOLDER`.

Accelerate takes FSDP2 for what several GPUs do; here its state says so of two processes on the CPU.
"""

import os
import sys
import warnings
from pathlib import Path

import launch
import tiny
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

import grit_optim


def plugin():
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )


def sharding(state):
    """Let Accelerate's state say that it shards."""
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin()


def full(model):
    return {n: p.detach().full_tensor() for n, p in model.named_parameters() if p.requires_grad}


def steps(accelerator, model, optimizer, first, last, rank, processes):
    for seed in range(first, last):
        ids = tiny.tokens(seed).chunk(processes)[rank]
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def accelerate(rank, processes, folder, factory, accumulation=1):
    """Prepared with an optimizer of the model before it is sharded; saved, and loaded into another."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    sharding(accelerator.state)
    models, told = [], {}
    for turn in range(2):
        accelerator._models, accelerator._optimizers = [], []
        model = tiny.llama()
        own = grit_optim.for_trainer(model, lr=1e-2, kfac_min_samples=8) if factory else tiny.grit(model)
        model, optimizer = accelerator.prepare(model, own)
        if turn == 0:
            steps(accelerator, model, optimizer, 0, 4, rank, processes)
            accelerator.save_state(str(folder / f"state {factory}"))
        else:
            accelerator.load_state(str(folder / f"state {factory}"))
        steps(accelerator, model, optimizer, 4, 6, rank, processes)
        models.append(full(model))
        told = own.telemetry(per_site=False)
    return {"weights": models, "engaged": told["engaged_sites"], "steps": told["steps"]}


SCENARIOS = {
    "Accelerate": lambda *where: accelerate(*where, factory=False),
    "factory": lambda *where: accelerate(*where, factory=True),
    "accumulation": lambda *where: accelerate(*where, factory=False, accumulation=2),
}

if __name__ == "__main__":
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    launch.join(folder, rank, processes)
    found = {}
    for name, scenario in SCENARIOS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[name] = scenario(rank, processes, folder)
        found[name]["warnings"] = [str(w.message) for w in caught if "grit" in str(w.message).lower()]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)
