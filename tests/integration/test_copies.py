"""Copies of the optimizer and of the model, garbage collection, and close()."""

import copy
import gc
import pickle
import weakref

import pytest
import support
import torch
from tiny import grit, llama, loss_of, train, trained, weights
from torch.optim.lr_scheduler import LinearLR
from twin import assert_equal, differing

MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]


# -------------------------------------------------------------------- copies


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("scheduled", [False, True], ids=["bare", "scheduled"])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("mode", MODES)
def test_copied_pair_trains_on_identically_and_alone(mode, make, scheduled):
    """A scheduler patches ``step`` on the instance. Neither the patch nor the original's taps come along."""
    model = llama()
    optimizer = grit(model, precondition=mode)
    if scheduled:
        LinearLR(optimizer, total_iters=3)
    train(model, optimizer, 3)
    twin_model, twin = make((model, optimizer))
    before = weights(model)
    losses = train(twin_model, twin, 3, first=3)
    assert_equal(weights(model), before)
    assert [r.fired for r in optimizer.check_capture()] == [0] * 14
    assert losses == train(model, optimizer, 3, first=3)
    assert_equal(weights(twin_model), weights(model))
    assert differing(weights(model), before) == 28


def test_copy_of_the_optimizer_alone_leaves_the_model_alone():
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    before = weights(model)
    copies = [p for group in twin.param_groups for p in group["params"]]
    assert [p.shape for p in copies] == [p.shape for p in trained(model)]
    for p in copies:
        p.grad = torch.ones_like(p)
    twin.step()
    assert_equal(weights(model), before)
    assert sum(not torch.equal(c, p) for c, p in zip(copies, trained(model), strict=True)) == 28
    assert optimizer.telemetry()["samples"] == twin.telemetry()["samples"]


def taps_of(model):
    return [tap for module in model.modules() for tap in module._forward_hooks.values()]


def test_copy_of_the_model_carries_taps_that_do_nothing():
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    loss_of(model).backward()
    assert [r.fired for r in optimizer.check_capture()] == [1] * 14
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(trained(twin), trained(model), strict=True))
    assert [tap.owner() for tap in taps_of(twin)] == [None] * 14


def test_model_does_not_keep_the_optimizer_alive():
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 2)
    alive, taps = weakref.ref(optimizer), taps_of(model)
    assert len({tap.owner() for tap in taps}) == 1
    del optimizer
    gc.collect()
    assert alive() is None
    assert [tap.owner() for tap in taps] == [None] * 14
    loss_of(model).backward()  # the taps left behind do nothing
    successor = grit(model)
    assert all(len(site.tap._forward_hooks) == 1 for site in support.sites(successor))


# -------------------------------------------------------------------- close


def hooks_of(model):
    return {name: list(m._forward_hooks.items()) for name, m in model.named_modules()}


@pytest.mark.parametrize("mode", MODES)
def test_close_leaves_the_model_as_it_was(mode):
    model = llama()
    for module in model.modules():
        if type(module).__name__ == "Linear":
            module.register_forward_hook(hooks_of_someone_else)
    before = hooks_of(model)
    optimizer = grit(model, precondition=mode)
    train(model, optimizer, 2)
    assert hooks_of(model) != before
    optimizer.close()
    optimizer.close()
    assert hooks_of(model) == before
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()
    train(model, optimizer.base, 1)


def hooks_of_someone_else(module, args, output):
    return None
