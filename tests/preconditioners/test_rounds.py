"""A base that steps each parameter alone does it in rounds: to the same bits, in little memory."""

import pytest
import tiny
import torch
from torch import nn

from benchmarks.cost.counting import LiveBytes
from grit_optim import GritOptimizer
from grit_optim.base import rounds
from grit_optim.lora import buckets
from grit_optim.preconditioners import held_gradients

BASES = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {}),
}
MODES = ("spectral", "steer", "eigenbasis", "balanced", "inverse")
WITH_MOMENTS = [(mode, fisher) for mode in ("steer", "inverse") for fisher in ("block_diagonal", "ekfac")]
MATRIX = 4 * 4 * 16 * 4  # bytes; no matrix of the model is smaller than a quarter of this


def trained(kind, settings, most, monkeypatch, steps=4, **options):
    """The model after some steps in rounds of ``most`` bytes, and its optimizer. A bias is trained too."""
    for module in (buckets, held_gradients):
        monkeypatch.setattr(module, "most_at_once", lambda groups: most)
    model = tiny.llama(init_lora_weights=False)
    model.base_model.model.lm_head.bias = nn.Parameter(torch.zeros(48))
    groups = [{"params": tiny.trained(model)[::2]}, {"params": tiny.trained(model)[1::2], "lr": 5e-3}]
    optimizer = GritOptimizer(kind(groups, lr=1e-2, **settings), model, kfac_min_samples=1, **options)
    tiny.train(model, optimizer, steps)
    return model, optimizer


def pairs(model):
    return {name: value for name, value in tiny.weights(model).items() if "lora" in name}


def seen(model, optimizer):
    told = optimizer.telemetry()
    return {
        "weights": tiny.weights(model),
        "bias": model.base_model.model.lm_head.bias.detach(),
        "state": optimizer.state_dict(),
        "telemetry": {
            name: told[name] for name in ("mean_cosine", "gradient_norm", "samples") if name in told
        },
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def counted(optimizer):
    """The number of gradients that the base sees in each of its steps from now on."""
    calls, step = [], type(optimizer.base).step

    class Counting(type(optimizer.base)):
        pass

    def noting(self, closure=None):
        calls.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
        return step(self, closure)

    Counting.step, Counting.__module__ = noting, "torch.optim.counting"
    Counting.__name__ = type(optimizer.base).__name__
    optimizer.base.__class__ = Counting
    return calls


@pytest.mark.parametrize(("name", "most"), [*((name, 1) for name in BASES), ("AdamW", 3 * MATRIX)])
def test_rounds_change_no_bit(monkeypatch, name, most):
    kind, settings = BASES[name]
    whole = trained(kind, settings, 2**40, monkeypatch)
    pieces = trained(kind, settings, most, monkeypatch)
    assert same(seen(*whole), seen(*pieces))
    tiny.loss_of(pieces[0]).backward()
    calls = counted(pieces[1])
    pieces[1].step()
    assert len(calls) == 28 if most == 1 else 3 < len(calls) < 28
    assert sum(calls) == 29


@pytest.mark.parametrize(("mode", "fisher"), [*((mode, "kfac") for mode in MODES), *WITH_MOMENTS])
def test_rounds_change_no_bit_in_any_mode(monkeypatch, mode, fisher):
    options = {"precondition": mode, "fisher": fisher, "lambda_kfac": 1e-3, "kfac_update_freq": 2}
    whole = trained(torch.optim.AdamW, {}, 2**40, monkeypatch, **options)
    assert same(seen(*whole), seen(*trained(torch.optim.AdamW, {}, 1, monkeypatch, **options)))


def test_an_infinite_gradient_anywhere_stops_every_round(monkeypatch):
    model, optimizer = trained(torch.optim.SGD, {}, 1, monkeypatch)
    tiny.loss_of(model).backward()
    before = pairs(model)
    next(p for name, p in model.named_parameters() if "lora_B" in name).grad[0, 0] = torch.inf
    optimizer.step()
    assert same(pairs(model), before)


class CountsForAll(torch.optim.SGD):
    """Counts its steps for all parameters together."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)


def test_a_base_that_counts_for_all_is_stepped_once(monkeypatch):
    optimizer = trained(CountsForAll, {}, 1, monkeypatch)[1]
    assert optimizer.base.count == 4


def test_hooks_and_schedulers_of_the_base_see_one_step(monkeypatch):
    model, optimizer = trained(torch.optim.SGD, {}, 1, monkeypatch)
    told = []
    assert rounds.steps_each_alone(optimizer.base)
    torch.optim.lr_scheduler.StepLR(optimizer.base, 1)
    assert rounds.steps_each_alone(optimizer.base)
    optimizer.base.register_step_pre_hook(lambda *_: told.append(1))
    tiny.train(model, optimizer, 3)
    assert len(told) == 3
    optimizer.base.step = optimizer.base.step
    assert not rounds.steps_each_alone(optimizer.base)


def test_a_joint_norm_is_of_all(monkeypatch):
    options = {"max_grad_norm": 0.01}
    whole = trained(torch.optim.SGD, {}, 2**40, monkeypatch, **options)
    pieces = trained(torch.optim.SGD, {}, 1, monkeypatch, **options)
    assert same(seen(*whole), seen(*pieces))


@pytest.mark.parametrize("mode", MODES)
def test_a_round_that_fails_leaves_no_matrix_half_way(monkeypatch, mode):
    """Each matrix is as it was or has taken the whole step, and all have their own gradients."""
    options = {"precondition": mode}
    model, optimizer = trained(torch.optim.SGD, {"momentum": 0.9}, 1, monkeypatch, **options)
    other, twin = trained(torch.optim.SGD, {"momentum": 0.9}, 1, monkeypatch, **options)
    tiny.loss_of(model, 9).backward()
    tiny.loss_of(other, 9).backward()
    twin.step()
    before, after = pairs(model), pairs(other)
    gradients = [p.grad for p in tiny.trained(model)]
    step, calls = torch.optim.SGD.step, []

    def failing(self, closure=None):
        calls.append(1)
        step(self, closure)
        if len(calls) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    now = pairs(model)
    moved = [torch.equal(now[name], after[name]) for name in now]
    assert all(done or torch.equal(now[name], before[name]) for name, done in zip(now, moved, strict=True))
    # What "inverse" gives the base is a gradient, so what the base made of it is the whole step.
    assert sum(moved) == (12 if mode == "inverse" else 11)
    assert all(p.grad is g for p, g in zip(tiny.trained(model), gradients, strict=True))


def test_ctrl_c_while_gradients_are_given_back_leaves_all_of_them():
    class Stubborn:
        """Takes its gradient at the second time."""

        def __init__(self, fails):
            self.fails = fails

        def __setattr__(self, name, value):
            if name == "grad" and self.fails:
                self.fails = False
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    parameters = [Stubborn(False), Stubborn(True), Stubborn(False)]
    with pytest.raises(KeyboardInterrupt):
        rounds.put_back([(p, i) for i, p in enumerate(parameters)])
    assert [p.grad for p in parameters] == [0, 1, 2]


def test_working_memory_is_bounded_and_so_are_the_rounds(monkeypatch):
    """Beside one stack of everything, which AdamW makes on a GPU, and r×r tensors, of 13 times their size."""
    allowed = 20_000
    monkeypatch.setattr(buckets, "MEMORY", allowed)
    for layers in (2, 8, 16):
        model = tiny.llama(layers=layers)
        base = torch.optim.AdamW(tiny.trained(model), lr=1e-2, fused=True)  # makes nothing itself
        optimizer = GritOptimizer(base, model, kfac_min_samples=1, capture="gradients")
        tiny.train(model, optimizer, 3)
        tiny.loss_of(model).backward()
        calls = counted(optimizer)
        with LiveBytes("cpu") as live:
            optimizer.step()
        sites = 7 * layers
        everything = sum(p.numel() for p in tiny.trained(model)) * 4
        assert live.peak < allowed + everything + 13 * sites * 2 * 4 * 4 * 4
        assert 2 < len(calls) < 2 * buckets.STACKS
