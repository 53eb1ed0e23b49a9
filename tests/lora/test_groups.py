"""The base's parameter groups change in the course of training, and the pairs follow, as under AdamW."""

import copy

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from torch.optim import AdamW
from twin import assert_equal

from grit_optim import GritOptimizer

MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]
PARTS = ("lora_A", "lora_B", "norm")
SETTINGS = (
    {"lr": 1e-2},
    {"lr": 1e-4, "weight_decay": 0.3},
    {"lr": 3e-3, "betas": (0.8, 0.99), "maximize": True},
)


def started(order=(0, 1, 2)):
    """A model with a trained head of norms, and its three parameter groups, whose settings all differ."""
    model = tiny.llama(layers=1, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "norm" in name)
    params = [[p for n, p in model.named_parameters() if p.requires_grad and part in n] for part in PARTS]
    return model, [{"params": params[i], **SETTINGS[i]} for i in order]


def wrapped(model, base, **options):
    return GritOptimizer(base, model, **{"kfac_min_samples": 8, **options})


def reverse(groups):
    groups.reverse()


def rotate(groups):
    groups.insert(0, groups.pop())


def move_out(groups):
    """The first group's parameters to the second group, and the empty group away."""
    groups[1]["params"].extend(groups[0]["params"])
    del groups[0]


def move_one(groups):
    groups[-1]["params"].append(groups[0]["params"].pop())


def add_empty(groups):
    groups.insert(0, {**groups[0], "params": [], "lr": 9.0})


EDITS = {edit.__name__: edit for edit in (reverse, rotate, move_out, move_one, add_empty)}


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(EDITS)), min_size=2, max_size=3))
def test_every_change_of_the_groups_is_exact_without_curvature(names):
    """Also where the list itself is another one; weights, the base's state and its state dict."""
    runs = []
    for wrap in (False, True):
        model, groups = started()
        base = optimizer = AdamW(groups)
        if wrap:
            optimizer = wrapped(model, base, precondition="none")
        tiny.train(model, optimizer, 1)
        for step, name in enumerate(names, 1):
            if len(optimizer.param_groups) > 1:
                EDITS[name](optimizer.param_groups)
            optimizer.param_groups = list(optimizer.param_groups)
            tiny.train(model, optimizer, 1, first=step)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        tiny.train(model, optimizer, 1, first=9)
        runs.append(tiny.weights(model))
    assert_equal(*runs)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_the_groups_is_of_no_consequence(mode):
    """Reversed while training, resumed from the reversed ones, as if it had been so from the start."""
    options = {"precondition": mode, "max_grad_norm": 0.5}
    model, groups = started(order=(2, 1, 0))
    expected = wrapped(model, AdamW(groups), **options)
    tiny.train(model, expected, 6)
    wanted = tiny.weights(model)

    model, groups = started()
    optimizer = wrapped(model, AdamW(groups), **options)
    tiny.train(model, optimizer, 2)
    optimizer.param_groups.reverse()
    tiny.train(model, optimizer, 2, first=2)
    base = AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    resumed = wrapped(model, base, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tiny.train(model, resumed, 2, first=4)
    assert_equal(tiny.weights(model), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_moves_takes_the_settings_of_its_new_group(mode):
    """As if the settings of a group of its own had been changed."""
    runs = []
    for moves in (True, False):
        model, groups = started()
        last = groups[0]["params"].pop()
        optimizer = wrapped(model, AdamW([{**groups[0], "params": [last]}, *groups]), precondition=mode)
        tiny.train(model, optimizer, 2)
        own, to = optimizer.param_groups[0], optimizer.param_groups[2]
        if moves:
            to["params"].append(last)
            del optimizer.param_groups[0]
        else:
            own.update({key: value for key, value in to.items() if key != "params"})
        tiny.train(model, optimizer, 2, first=2)
        runs.append(tiny.weights(model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["assigned", "appended"])
def test_pairs_that_a_list_of_groups_brings_along_are_tapped(how):
    """A finetuning schedule that is restarted assigns the groups of before, and then loads the checkpoint."""
    model, _ = started()
    late = [p for n, p in model.named_parameters() if "lora_" in n and "v_proj" in n]
    early = [p for n, p in model.named_parameters() if "lora_" in n and "v_proj" not in n]
    optimizer = wrapped(model, AdamW(early, lr=1e-2))
    assert optimizer.telemetry()["sites"] == 2
    both = [*optimizer.param_groups, {**optimizer.param_groups[0], "params": late}]
    if how == "assigned":
        optimizer.param_groups = both
        assert optimizer.telemetry()["sites"] == 3
    else:
        optimizer.param_groups.append(both[1])
    tiny.train(model, optimizer, 3)
    assert optimizer.telemetry()["engaged_sites"] == 3

    resumed = wrapped(model, AdamW(early, lr=1e-2))
    if how == "assigned":
        resumed.param_groups = [{"params": g["params"]} for g in optimizer.param_groups]
    else:
        resumed.param_groups.append({"params": late})
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.telemetry()["samples"] == optimizer.telemetry()["samples"]


@pytest.mark.parametrize("mode", MODES)
def test_a_pair_that_leaves_the_groups_is_left_alone(mode):
    """The base no longer steps it; an optimizer that is built without it loads the checkpoint."""
    model, groups = started()
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = wrapped(model, AdamW(groups), precondition=mode)
    tiny.train(model, optimizer, 2)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "v_proj" in names[id(p)]:
                optimizer.state.pop(p)
        group["params"] = [p for p in group["params"] if "v_proj" not in names[id(p)]]
    product = model.base_model.model.model.layers[0].self_attn.v_proj.get_delta_weight("default").detach()
    tiny.train(model, optimizer, 2, first=2)
    after = model.base_model.model.model.layers[0].self_attn.v_proj.get_delta_weight("default").detach()
    torch.testing.assert_close(after, product, rtol=1e-4, atol=1e-6)  # "balanced" changes its coordinates
    saved = optimizer.state_dict()
    assert len(saved["grit"]["sites"]) == 2
    without = wrapped(
        model, AdamW([{"params": g["params"]} for g in optimizer.param_groups]), precondition=mode
    )
    without.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert len(without.ranks()) == 2


def test_the_reported_rate_is_the_pairs_own():
    model, groups = started(order=(2, 0, 1))
    optimizer, records = wrapped(model, AdamW(groups)), []
    optimizer.log_to(records.append, every=1)
    tiny.train(model, optimizer, 1)
    optimizer.param_groups.reverse()
    tiny.train(model, optimizer, 1, first=1)
    optimizer.finish_logging()
    assert [r["lr"] for r in records if r["kind"] == "step"] == [1e-2, 1e-2]


# -------------------------------------------------------------------- pairs that are not trained yet


def head_first(model):
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    return [p for p in model.parameters() if p.requires_grad], lora


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "options", [{}, {"reprojection": "balanced", "rank_budget": 0.5, "min_lora_rank": 0}]
)
def test_the_head_first_and_the_pairs_later(options):
    model = tiny.llama(layers=1)
    head, lora = head_first(model)
    optimizer = GritOptimizer(AdamW(head + lora, lr=1e-2), model, kfac_min_samples=8, **options)
    plain_model = tiny.llama(layers=1)
    plain = AdamW([*head_first(plain_model)[0]], lr=1e-2)
    assert tiny.train(model, optimizer, 7) == tiny.train(plain_model, plain, 7)
    assert dict(optimizer.ranks()) == {}
    assert optimizer.telemetry()["sites"] == 0
    with pytest.raises(ValueError, match="none is trained yet"):
        optimizer.reduce_ranks_(0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    for p in lora:
        p.requires_grad_()
    tiny.train(model, optimizer, 4, first=7)
    assert optimizer.telemetry()["sites"] == 7
    assert optimizer.ranks().predicted_loss >= 0
    head_first(model)
    resumed = GritOptimizer(AdamW(head + lora, lr=1e-2), model, kfac_min_samples=8, **options)
    resumed.load_state_dict(saved)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.telemetry()["samples"] == optimizer.telemetry()["samples"]


def test_pairs_that_cannot_be_tapped_once_they_are_trained_are_named_then():
    model = tiny.llama(layers=1)
    head, lora = head_first(model)
    optimizer = GritOptimizer(AdamW(head + lora, lr=1e-2), model)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "lora_B" in name)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [nn.Parameter(torch.zeros(2))]})
    with pytest.warns(UserWarning, match=r"leaves 7 adapter\(s\) to the base.*only B is trained"):
        tiny.train(model, optimizer, 1)


def test_the_inactive_of_two_adapters():
    model = tiny.llama(layers=1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("default")
    other = [p for n, p in model.named_parameters() if ".other." in n]
    optimizer = GritOptimizer(AdamW(other, lr=1e-2), model, kfac_min_samples=8)
    assert dict(optimizer.ranks()) == {}
    model.set_adapter("other")
    tiny.train(model, optimizer, 3)
    assert list(optimizer.ranks().values()) == [2]


def test_the_error_says_what_the_base_holds_and_the_model_does_not():
    model, other = tiny.llama(layers=1), tiny.llama(layers=1)
    named = [(n, p) for n, p in other.named_parameters() if p.requires_grad]
    for base, name in (
        (AdamW(named, lr=1e-2), named[0][0]),
        (tiny.adamw(other), "param_groups[0]['params'][0] [4, 16]"),
    ):
        with pytest.raises(ValueError, match=r"14 of the base's 14 parameters are none of PeftModel's") as e:
            GritOptimizer(base, model)
        assert name in str(e.value)
        assert "PeftModel has 7 pairs (base_model.model.model.layers.0.self_attn.q_proj.default, " in str(
            e.value
        )
        assert "get_peft_model" not in str(e.value)
