"""GritOptimizer stands for its base in all that torch, a scaler or a training loop does to an optimizer."""

import copy

import pytest
import torch
from tiny import adamw, grit, llama, loss_of, train, trained, weights
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LinearLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from twin import assert_equal, differing, warm

from grit_optim import GritOptimizer

EXACT = {"precondition": "none", "reprojection": "none"}
MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]
HOOK_KINDS = [
    f"{when}_{end}" for when in ("step", "state_dict", "load_state_dict") for end in ("pre_hook", "post_hook")
]


# -------------------------------------------------------------------- the base's own objects


def reload(optimizer):
    """What accelerate.prepare does before training: the base then gets a new list of groups."""
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("prepare", [lambda optimizer: None, reload], ids=["built", "reloaded"])
def test_groups_state_and_defaults_are_the_bases_own(prepare):
    model = llama()
    optimizer = grit(model)
    prepare(optimizer)
    assert isinstance(optimizer, Optimizer)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(optimizer.base, name)


def test_hooks_on_all_optimizers_run_once_a_step_for_the_optimizer_that_is_stepped():
    model = llama(layers=1)
    optimizer, seen = grit(model), []
    before = register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", o)))
    after = register_optimizer_step_post_hook(lambda o, *_: seen.append(("after", o)))
    optimizer.base.register_step_post_hook(lambda o, *_: seen.append(("of the base", o)))
    try:
        train(model, optimizer, 1)
        expected = [("before", optimizer), ("of the base", optimizer.base), ("after", optimizer)]
        assert seen == expected
        optimizer.base.step()  # by itself it is an optimizer like any other
        assert [o for _, o in seen[3:]] == [optimizer.base] * 3
    finally:
        before.remove()
        after.remove()


def test_a_profiler_finds_our_name_once_a_call():
    model = llama(layers=1)
    optimizer = grit(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(model, optimizer, 2)
    names = [event.name for event in profiler.events() if event.name.startswith("Optimizer.")]
    assert names.count("Optimizer.step#GritOptimizer.step") == 2
    assert names.count("Optimizer.zero_grad#GritOptimizer.zero_grad") == 2


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_setters_reach_the_base(name):
    optimizer = grit(llama())
    replacement = copy.copy(getattr(optimizer.base, name))
    setattr(optimizer, name, replacement)
    assert getattr(optimizer.base, name) is replacement


def test_setstate_sets_up_hooks_without_touching_the_groups():
    """`Optimizer.__setstate__(self, {})` is semi-private; a torch that changes it must be noticed here."""
    base = adamw(llama())
    groups, group, settings, state = (
        base.param_groups,
        base.param_groups[0],
        dict(base.param_groups[0]),
        base.state,
    )
    shell = object.__new__(type("Shell", (GritOptimizer,), {}))
    shell.base = base
    Optimizer.__setstate__(shell, {})
    hooks = {key for key in vars(shell) if key.startswith("_optimizer_")}
    assert hooks == {f"_optimizer_{kind}s" for kind in HOOK_KINDS}
    assert type(shell).step.hooked is True
    assert base.param_groups is groups
    assert base.param_groups[0] is group
    assert base.state is state
    assert {k: v for k, v in group.items() if k != "params"} == {
        k: v for k, v in settings.items() if k != "params"
    }


@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_every_kind_of_hook_fires_once(kind):
    model = llama()
    optimizer = grit(model)
    seen = []
    handle = getattr(optimizer, f"register_{kind}")(lambda *args: seen.append(args[0]))
    train(model, optimizer, 1)
    reload(optimizer)
    assert len(seen) == 1
    assert seen[0] is optimizer
    handle.remove()
    train(model, optimizer, 1)
    reload(optimizer)
    assert len(seen) == 1


def test_state_dict_hooks_may_replace_the_state():
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 2)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 3})
    saved = optimizer.state_dict()
    assert saved["extra"] == 3
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {k: v for k, v in state.items() if k != "grit"}
    )
    optimizer.load_state_dict(saved)
    assert optimizer.telemetry()["steps"] == 0  # the hook took GRIT's part away: it starts anew
    assert "grit" in saved


def test_add_param_group():
    model = llama(modules_to_save=["lm_head"])
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n]
    optimizer = GritOptimizer(AdamW(rest, lr=1e-2), model, kfac_min_samples=8)
    plain_model = llama(modules_to_save=["lm_head"])
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": head, "lr": 0.5})
    assert [group["lr"] for group in optimizer.base.param_groups] == [1e-2, 0.5]
    before = weights(model)
    train(model, optimizer, 1)
    assert len(head) == 1
    moved = next(n for n in before if "lm_head" in n)
    assert torch.allclose((weights(model)[moved] - before[moved]).abs().max(), torch.tensor(0.5), rtol=0.02)
    assert len(trained(plain_model)) == len(trained(model))


def test_add_param_group_taps_the_pairs_that_it_completes():
    model = llama()
    first, second = (
        [p for n, p in model.named_parameters() if p.requires_grad and f"layers.{i}." in n] for i in (0, 1)
    )
    optimizer = GritOptimizer(AdamW(first, lr=1e-2), model, kfac_min_samples=8)
    train(model, optimizer, 3)
    before = optimizer.telemetry()
    optimizer.add_param_group({"params": second})
    after = optimizer.telemetry()
    assert (before["sites"], after["sites"]) == (7, 14)
    assert {name: after["samples"][name] for name in before["samples"]} == before["samples"]
    train(model, optimizer, 3)
    assert optimizer.telemetry()["engaged_sites"] == 14


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    model = llama()
    optimizer = grit(model)
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=to_none)
    gradients = [p.grad for p in trained(model)]
    assert len(gradients) == 28
    assert all(g is None if to_none else torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert [r.fired for r in optimizer.check_capture()] == [0] * 14


def test_zero_grad_kind_does_not_matter_to_the_run():
    runs = []
    for to_none in (True, False):
        model = llama()
        optimizer = grit(model)
        for seed in range(5):
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(model, seed).backward()
            optimizer.step()
        runs.append(weights(model))
    assert_equal(*runs)


# -------------------------------------------------------------------- exactly the base

BASES = {
    "adamw": lambda ps: AdamW(ps, lr=1e-2, weight_decay=0.1),
    "sgd": lambda ps: SGD(ps, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "amsgrad": lambda ps: Adam(ps, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda ps: RMSprop(ps, lr=1e-3, weight_decay=0.1),
    "adagrad": lambda ps: Adagrad(ps, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES.keys())
def test_without_curvature_it_is_the_base_bit_for_bit(make):
    ours, plain = llama(), llama()
    optimizer, base = GritOptimizer(make(trained(ours)), ours, **EXACT), make(trained(plain))
    assert train(ours, optimizer, 10) == train(plain, base, 10)
    assert_equal(weights(ours), weights(plain))
    assert optimizer.telemetry()["folds"] == 10


def with_other_parameters():
    """LoRA, a head that PEFT trains as a whole, and trainable norms."""
    model = warm(llama(modules_to_save=["lm_head"]))
    for name, p in model.named_parameters():
        if "norm" in name:
            p.requires_grad_(True)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_are_no_site_get_what_the_base_gives_them(mode):
    """In one step from the same weights their gradients are the same, so whatever differs is GRIT's doing."""
    ours, plain = with_other_parameters(), with_other_parameters()
    optimizer = grit(
        ours, precondition=mode, kfac_update_freq=1, max_grad_norm=1e-3 if mode != "none" else None
    )
    train(ours, optimizer, 1)
    train(plain, adamw(plain), 1)
    got, expected = weights(ours), weights(plain)
    other = [n for n in got if "lora_" not in n]
    assert len(other) == 6  # two norms in each of two layers, the last norm, the head
    assert all(torch.equal(got[n], expected[n]) for n in other)
    assert differing(got, expected) == (0 if mode == "none" else 28)


# -------------------------------------------------------------------- closures


def test_closure_runs_once_with_gradients_and_its_loss_comes_back():
    """Lightning clears and runs both passes inside step(closure); that must equal the hand-written loop."""
    ours, plain = llama(), llama()
    optimizer, calls = grit(ours), []

    def closure(seed):
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(ours, seed)
        loss.backward()
        return loss

    losses = [optimizer.step(lambda seed=seed: closure(seed)).item() for seed in range(4)]
    assert losses == train(plain, grit(plain), 4)
    assert calls == [True] * 4
    assert_equal(weights(ours), weights(plain))


# -------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("prepare", [lambda optimizer: None, reload], ids=["built", "reloaded"])
def test_schedule_reaches_the_base(prepare):
    model = llama()
    optimizer = grit(model, lr=1.0)
    scheduler = LinearLR(optimizer, start_factor=0.5, end_factor=1.0, total_iters=4)
    prepare(optimizer)
    rates = []
    for seed in range(4):
        train(model, optimizer, 1, first=seed)
        scheduler.step()
        rates.append(optimizer.base.param_groups[0]["lr"])
    assert rates == pytest.approx([0.625, 0.75, 0.875, 1.0])


def test_one_cycle_turns_rate_and_momentum_as_for_the_base():
    ours, plain = llama(), llama()
    optimizer, base = GritOptimizer(adamw(ours), ours, **EXACT), adamw(plain)
    for model, stepped in ((ours, optimizer), (plain, base)):
        scheduler = OneCycleLR(stepped, max_lr=0.1, total_steps=8)
        for seed in range(6):
            train(model, stepped, 1, first=seed)
            scheduler.step()
    keys = ("lr", "betas", "max_momentum", "base_momentum")
    assert [optimizer.base.param_groups[0][k] for k in keys] == [base.param_groups[0][k] for k in keys]
    assert_equal(weights(ours), weights(plain))
