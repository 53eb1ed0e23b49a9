"""check_capture() tells where the taps do not see what the gradients saw; the first steps warn of it once."""

import warnings

import pytest
import support
import torch
from around import go_around_the_tap, layer_of
from tiny import HandWritten, adamw, grit, llama, loss_of, train, trained
from torch import nn
from torch.nn import functional as F
from twin import still, warm

from grit_optim import GritOptimizer, Site

SILENT = "GRIT does nothing for"
MISMATCH = "do not see what their gradients come from"


def statuses(optimizer):
    return {r.name: r.status for r in optimizer.check_capture()}


def counted(optimizer):
    found = list(statuses(optimizer).values())
    return {status: found.count(status) for status in set(found)}


def grit_warnings(caught):
    return [str(w.message) for w in caught if SILENT in str(w.message) or MISMATCH in str(w.message)]


# -------------------------------------------------------------------- statuses


def test_ok_once_the_pairs_are_warm():
    model = warm(llama())
    optimizer = still(model)
    assert counted(optimizer) == {"unused": 14}
    loss_of(model).backward()
    assert counted(optimizer) == {"ok": 14}


def test_unknown_while_b_is_zero():
    model = llama()
    optimizer = still(model)
    loss_of(model).backward()
    assert counted(optimizer) == {"unknown": 14}
    assert {r.fired for r in optimizer.check_capture()} == {1}


def test_unknown_in_a_step_that_does_not_record():
    model = warm(llama())
    optimizer = still(model, cov_update_freq=3)
    for _ in range(2):
        loss_of(model).backward()
        assert counted(optimizer) == {"ok": 14}
        optimizer.step()
        optimizer.zero_grad()
    loss_of(model).backward()
    assert counted(optimizer) == {"unknown": 14}
    assert {(r.fired, r.tap_inner) for r in optimizer.check_capture()} == {(1, None)}


@pytest.mark.parametrize("factor", [1e-3, 0.1, 1024.0])
def test_a_common_factor_is_the_trainers_clipping(factor):
    model = warm(llama())
    optimizer = still(model)
    loss_of(model).backward()
    for p in trained(model):
        p.grad *= factor
    assert counted(optimizer) == {"ok": 14}


def test_one_pairs_own_factor_is_a_mismatch():
    model = warm(llama())
    optimizer = still(model)
    loss_of(model).backward()
    trained(model)[0].grad *= 1.1
    assert counted(optimizer) == {"ok": 13, "mismatch": 1}


def test_a_pair_that_takes_no_part_is_unused():
    model = warm(llama())
    name = "layers.1.mlp.up_proj"
    layer = layer_of(model, name)
    layer.forward = layer.base_layer.forward
    optimizer = still(model)
    loss_of(model).backward()
    assert counted(optimizer) == {"ok": 13, "unused": 1}
    assert [n for n, s in statuses(optimizer).items() if s == "unused"] == [
        f"base_model.model.model.{name}.default"
    ]


@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zero"])
def test_cleared_gradients_are_no_gradients(to_none):
    model = warm(llama())
    optimizer = still(model)
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=to_none)
    assert counted(optimizer) == {"unused": 14}


# -------------------------------------------------------------------- warnings


@pytest.mark.parametrize("make", [llama, lambda: warm(llama())], ids=["B zero", "B warm"])
def test_a_pair_read_around_its_tap_is_named_once(make):
    model = make()
    go_around_the_tap(layer_of(model, "layers.0.self_attn.v_proj"))
    optimizer = grit(model, capture="taps")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 8)
    told = grit_warnings(caught)
    assert len(told) == 1
    assert f"{SILENT} 1 site(s) (base_model.model.model.layers.0.self_attn.v_proj.default)" in told[0]
    loss_of(model).backward()
    assert counted(optimizer) == {"ok": 13, "silent": 1}


def test_all_pairs_read_around_their_taps():
    model = llama()
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            go_around_the_tap(module)
    optimizer = grit(model, capture="taps")
    with pytest.warns(UserWarning, match=rf"{SILENT} 14 site\(s\).*…"):
        train(model, optimizer, 2)
    told = optimizer.telemetry()
    assert (told["steps"], told["engaged_sites"]) == (0, 0)


class HalfAround(nn.Module):
    """Three pairs, each used twice; the last one's second use reads the weights directly."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(HandWritten(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for layer in self.layers[:2]:
            x = torch.tanh(layer(x))
        last = self.layers[2]
        return last.frozen(x) + last.scaling * F.linear(F.linear(x, last.down.weight), last.up.weight)


def test_half_of_the_uses_around_the_tap_is_a_mismatch():
    model = HalfAround()
    sites = [Site.from_modules(f"pair{i}", m.down, m.up, m.scaling) for i, m in enumerate(model.layers)]
    optimizer = GritOptimizer(adamw(model), model, sites=sites, kfac_min_samples=8, capture="taps")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(torch.randn(5, 7, 6)).square().mean().backward()
            found = statuses(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert found == {"pair0": "ok", "pair1": "ok", "pair2": "mismatch"}
    told = grit_warnings(caught)
    assert len(told) == 1
    assert told[0].startswith("the taps of 1 site(s) (pair2) do not see")


@pytest.mark.parametrize("make", [llama, lambda: warm(llama())], ids=["B zero", "B warm"])
@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zero"])
def test_a_whole_run_without_cause_warns_of_nothing(make, to_none):
    model = make()
    optimizer = grit(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        for seed in range(6):
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(model, seed).backward()
            torch.nn.utils.clip_grad_norm_(trained(model), 0.1)
            optimizer.step()
    assert optimizer.telemetry()["steps"] == 6


def test_a_pair_that_rests_behind_zeroed_gradients_is_not_called_silent():
    """With zero_grad(set_to_none=False) a pair that takes no part in a step has a gradient of zeros."""
    model = warm(llama())
    layer = layer_of(model, "layers.1.mlp.up_proj")
    optimizer = grit(model)
    support.parts(optimizer).capture.watch.steps_left = 5
    forward = layer.forward
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            layer.forward = layer.base_layer.forward if seed % 2 else forward
            loss_of(model, seed).backward()
            support.parts(optimizer).capture.watch.steps_left = 5  # look in every step
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert grit_warnings(caught) == []


# -------------------------------------------------------------------- steps without a backward pass


def zero_gradient_step(model, optimizer):
    """What torch.distributed.checkpoint does to make the base set its state up."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"])
@pytest.mark.parametrize("capture", ["taps", "gradients"])
def test_a_step_without_backward_advances_nothing(mode, capture):
    model = llama()
    optimizer = grit(model, precondition=mode, reprojection="balanced", reprojection_freq=1, capture=capture)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero_gradient_step(model, optimizer)
    told = optimizer.telemetry()
    assert [told[key] for key in ("steps", "refreshes", "reprojections", "folds", "engaged_sites")] == [0] * 5
    assert set(told["samples"].values()) == {0}
    after = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 28
    assert all(torch.equal(before[n], after[n]) for n in before)
    if capture == "taps":
        go_around_the_tap(layer_of(model, "layers.0.self_attn.v_proj"))
        with pytest.warns(UserWarning, match=SILENT):  # that step has not used the first steps' look up
            train(model, optimizer, 2)


def test_distributed_checkpoint_reads_the_state():
    """Its own call, on one process; it needs an initialised state for every parameter."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = llama()
    optimizer = grit(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = get_optimizer_state_dict(model, optimizer)
    assert len(state["state"]) == 28
    assert optimizer.telemetry()["steps"] == 0
