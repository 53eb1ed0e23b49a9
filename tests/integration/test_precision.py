"""Gradient scaling, with and without overflow, and a base that keeps its state in 8 bits."""

import copy
import warnings

import pytest
import torch
from tiny import HandWritten, adamw, grit, llama, loss_of, train, trained, weights
from twin import assert_equal, warm

from grit_optim import GritOptimizer, Site

MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]


# -------------------------------------------------------------------- gradient scaling


def scaled_training(model, optimizer, scaler, steps, first=0):
    for seed in range(first, first + steps):
        scaler.scale(loss_of(model, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def scaler_of(scale, **kwargs):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, **kwargs)


def test_fused_base_does_not_lend_its_amp_support():
    """With that attribute GradScaler hands over scaled gradients and does not skip overflow."""
    model = llama()
    base = adamw(model, fused=True)
    assert base._step_supports_amp_scaling is True
    assert not hasattr(GritOptimizer(base, model), "_step_supports_amp_scaling")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_scale_leaves_no_trace(mode, fused):
    """A power of two only moves exponents, so the scaled run must be the unscaled one bit for bit."""
    runs = []
    for scale in (1.0, 2.0**12):
        model = llama()
        optimizer = GritOptimizer(adamw(model, fused=fused), model, precondition=mode, kfac_min_samples=8)
        scaled_training(model, optimizer, scaler_of(scale), 4)
        runs.append(weights(model))
    assert_equal(*runs)


def test_overflow_is_skipped_and_its_statistics_discarded():
    ours, reference = warm(llama()), warm(llama())
    optimizer, twin = grit(ours), grit(reference)
    scaler = scaler_of(2.0**127, backoff_factor=2.0**-117)
    start = weights(ours)
    scaled_training(ours, optimizer, scaler, 1, first=99)
    assert_equal(weights(ours), start)
    assert scaler.get_scale() == 2.0**10
    scaled_training(ours, optimizer, scaler, 3)
    train(reference, twin, 3)
    assert_equal(weights(ours), weights(reference))
    assert optimizer.telemetry()["dropped_folds"] == 0
    assert optimizer.telemetry()["steps"] == 3


def test_overflow_whose_gradients_the_model_cleared():
    """Trainer calls model.zero_grad(): the skipped step's infinite statistics are gone with its gradients."""
    model = warm(llama())
    optimizer = grit(model)
    (loss_of(model, 99) * float("inf")).backward()
    model.zero_grad()
    train(model, optimizer, 1)
    assert optimizer.telemetry()["dropped_folds"] == 0
    assert max(optimizer.telemetry()["samples"].values()) == 44


def test_skipped_step_with_finite_taps_is_no_mismatch():
    """A scaler also skips where only the product δ xᵀ overflowed."""
    model = warm(llama())
    optimizer = grit(model)
    loss_of(model, 99).backward()
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    assert max(optimizer.telemetry()["samples"].values()) == 2 * 44


# -------------------------------------------------------------------- bitsandbytes


def dequantized(state, which):
    """Blockwise 8-bit state by the book: the code's value times the block's absolute maximum."""
    codes = state[f"qmap{which}"][state[f"state{which}"].long()]
    scales = state[f"absmax{which}"]
    return codes * scales.repeat_interleave(codes.numel() // scales.numel()).view_as(codes)


def eight_bit_step():
    """One step, with and without GRIT, of matrices of 4,096 elements: bitsandbytes' least for 8 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    runs = []
    for wrap in (False, True):
        torch.manual_seed(3)
        model = HandWritten(512, 512, rank=8)
        base = bnb.optim.AdamW8bit(trained(model), lr=1e-2, weight_decay=0.0)
        sites = [Site.from_modules("pair", model.down, model.up, model.scaling)]
        options = {"precondition": "steer", "kfac_min_samples": 8, "kfac_damping": 0.03}
        optimizer = GritOptimizer(base, model, sites=sites, **options) if wrap else base
        before = weights(model)
        model(torch.randn(64, 512)).square().mean().backward()
        optimizer.step()
        runs.append((model, base, optimizer, before))
    return runs


def test_eight_bit_state_is_dequantized_for_steering():
    (plain, _, _, _), (model, base, optimizer, before) = eight_bit_step()
    state = base.state[model.down.weight]
    assert state["state1"].dtype == torch.uint8
    assert optimizer.telemetry()["engaged_sites"] == 1
    root = dequantized(state, "2").mean(0, keepdim=True).sqrt()
    factor = optimizer.state_dict()["grit"]["sites"]["pair"]["gradient"].double()
    damped = factor + 0.03 * factor.trace() / 8 * torch.eye(8)
    natural = torch.linalg.solve(damped, (dequantized(state, "1") / root.clamp_min(1e-38)).double())
    length = (plain.down.weight.detach() - before["down.weight"]).norm()
    expected = (-length * natural / natural.norm()).float()
    step = model.down.weight.detach() - before["down.weight"]
    assert torch.allclose(step, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_eight_bit_base_trains():
    """The target differs from the model by a pair of the same rank, so it can be reached."""
    _, (model, _, optimizer, _) = eight_bit_step()
    other = copy.deepcopy(model)
    for module in (other.down, other.up):
        torch.nn.init.normal_(module.weight, std=0.1)
    x, losses = torch.randn(64, 512), []
    target = other(x).detach()
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.telemetry()["mean_cosine"] < 0.999  # the steps were turned
