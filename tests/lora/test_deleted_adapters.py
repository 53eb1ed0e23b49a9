"""An adapter that PEFT has deleted: every call goes on with the pairs that are left, before a step too."""

import copy

import layered
import pytest
import torch
from peft import LoraConfig
from torch import nn

from grit_optim import GritOptimizer

CALLS = {
    "state_dict": lambda o, path: o.state_dict(),
    "load_state_dict": lambda o, path: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "check_capture": lambda o, path: o.check_capture(),
    "deepcopy": lambda o, path: copy.deepcopy(o),
    "assigned groups": lambda o, path: setattr(o, "param_groups", list(o.param_groups)),
    "add_param_group": lambda o, path: o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "ranks": lambda o, path: o.ranks(),
    "telemetry": lambda o, path: o.telemetry(),
    "log_to": lambda o, path: o.log_to(path / "log", every=1),
    "save_adapter": lambda o, path: o.save_adapter(path / "adapter"),
    "reduce_ranks_": lambda o, path: o.reduce_ranks_(0.8),
    "shrink_": lambda o, path: o.shrink_(),
}


def two_adapters():
    model = layered.model()
    add(model, 2)
    base = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    optimizer = GritOptimizer(base, model, kfac_min_samples=4, min_lora_rank=1)
    for adapter in ("two", "default"):
        model.set_adapter(adapter)
        layered.train(model, optimizer, 2)
    assert optimizer.telemetry()["sites"] == 4
    return model, optimizer


def add(model, rank):
    model.add_adapter("two", LoraConfig(r=rank, target_modules=["first"], init_lora_weights=False))


@pytest.mark.filterwarnings("ignore:the weights of 1 LoRA site")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_call_goes_on_with_the_pairs_that_are_left(tmp_path, call):
    model, optimizer = two_adapters()
    model.delete_adapter("two")
    call(optimizer, tmp_path)
    optimizer.zero_grad()
    layered.train(model, optimizer, 2)
    assert optimizer.telemetry()["sites"] == 3
    assert len(optimizer.state_dict()["grit"]["sites"]) == 3


@pytest.mark.filterwarnings("ignore:the weights of 1 LoRA site")
@pytest.mark.parametrize("rank", [2, 3])
def test_an_adapter_of_a_deleted_ones_name_starts_anew(rank):
    model, optimizer = two_adapters()
    model.delete_adapter("two")
    add(model, rank)
    model.set_adapter("two")
    fresh = [p for n, p in model.named_parameters() if ".two." in n]
    optimizer.add_param_group({"params": fresh, "lr": 1e-2})
    optimizer.zero_grad()
    layered.train(model, optimizer, 2)
    assert optimizer.telemetry()["samples"]["base_model.model.first.two"] == 24


def test_pairs_that_share_a_matrix_are_left_to_the_base():
    model = layered.model(d_in=8)
    linear = model.base_model.model
    linear.second.lora_A, linear.second.lora_B = linear.first.lora_A, linear.first.lora_B
    with pytest.warns(UserWarning, match=r"leaves 2 adapter\(s\).*shares its matrices"):
        optimizer = layered.grit(model)
    assert optimizer.telemetry()["sites"] == 1
    layered.train(model, optimizer, 2)


def test_names_may_be_fewer_than_parameters():
    model = layered.model()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = GritOptimizer(torch.optim.AdamW(named, lr=1e-2), model, kfac_min_samples=4)
    for shape in ((3, 4), (5, 3)):  # as A and B of another model's
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(shape)))
    with pytest.warns(UserWarning, match=r"param_groups\[0\]\['params'\]\[6\]"):
        layered.train(model, optimizer, 2)
