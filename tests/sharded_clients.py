"""One of two processes in which a trainer shards the model: `sharded_clients.py RANK PROCESSES FOLDER`.

Accelerate takes FSDP2 for what several GPUs do; here its state says so of two processes on the CPU.
"""

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import hf
import launch
import tiny
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

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
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in found.items()}


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


class Sharding(Trainer):
    """A Trainer with ``fsdp=`` whose Accelerate takes two processes on the CPU for GPUs."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


def trainer(rank, processes, folder):
    """The Trainer shards the model and builds the optimizer; the run, and its second half once more."""
    found = []
    for resumed in (False, True) if processes > 1 else (False,):
        AcceleratorState._reset_state(reset_partial_state=True)
        sharded = {
            "ddp_backend": "gloo",
            "fsdp": True,
            "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
        arguments = hf.settings(
            folder / f"trainer of {processes}",
            per_device_train_batch_size=4 // processes,
            logging_strategy="no",
            save_strategy="steps",
            save_steps=3,
            **(sharded if processes > 1 else {}),
        )
        factory = grit_optim.for_trainer, {"lr": 1e-2, "kfac_min_samples": 8}
        kind = Sharding if processes > 1 else Trainer
        examples = hf.examples(24)
        client = kind(tiny.llama(), arguments, train_dataset=examples, optimizer_cls_and_kwargs=factory)
        client.train(resume_from_checkpoint=f"{arguments.output_dir}/checkpoint-3" if resumed else None)
        found.append(full(client.model))
    told = client.optimizer.optimizer.telemetry(per_site=False)
    return {"weights": found, "engaged": told["engaged_sites"], "steps": told["steps"]}


def nf4(rank, processes, folder, whole=False):
    """QLoRA: layers in NF4 that FSDP2 shares out in whatever bytes they have, or leaves ``whole``."""
    model = tiny.llama(hidden=64)
    for layer in [m for m in model.modules() if hasattr(m, "base_layer")]:
        rows, columns = layer.base_layer.weight.shape
        small = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4")
        values = layer.base_layer.weight.detach()
        small.weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=small)
        layer.base_layer = small.to("cpu")
    frozen = {p for p in model.parameters() if type(p).__name__ == "Params4bit"}
    assert len(frozen) == 14
    if processes > 1:
        for part in (*model.get_base_model().model.layers, model):
            fully_shard(part, ignored_params=frozen if whole else None)
    optimizer = tiny.grit(model)
    for seed in range(4):
        ids = tiny.tokens(seed).chunk(processes)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    told = optimizer.telemetry(per_site=False)
    return {"weights": [full(model)], "engaged": told["engaged_sites"], "steps": told["steps"]}


SCENARIOS = {
    "Accelerate": lambda *where: accelerate(*where, factory=False),
    "factory": lambda *where: accelerate(*where, factory=True),
    "accumulation": lambda *where: accelerate(*where, factory=False, accumulation=2),
}
if find_spec("bitsandbytes"):
    import bitsandbytes

    SCENARIOS |= {"NF4": nf4, "NF4 left whole": lambda *where: nf4(*where, whole=True)}
if hf.HANDS_OVER_THE_MODEL:
    SCENARIOS["Trainer"] = trainer

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
