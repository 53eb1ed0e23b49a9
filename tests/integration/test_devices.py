"""The optimizer on a GPU, and the same tests on the CPU where they mean something there.

``pytest -m gpu`` runs what needs a CUDA device. The bodies run on the CPU too, so that a GPU finds no
mistakes but its own.
"""

import copy
import io
import warnings
from functools import partial

import pytest
import tiny
import torch
from on_devices import WAITING_FOR_NOTHING, loss_on, on_cpu, started, train
from torch import nn

from benchmarks.cost.shapes import Workload, adapted_model, batches
from grit_optim import GritOptimizer, Site, linalg

MODES = [*WAITING_FOR_NOTHING, "eigenbasis", "balanced"]


@pytest.fixture
def products_on_the_cpu(monkeypatch):
    """On the CPU, too, take roots by products of matrices, as every other device does."""

    def root(factor, strength, order, damping):
        if order not in (2, 4) or damping < linalg.SMALLEST_NEWTON_DAMPING:
            return linalg.damped_power(factor, strength, 1 / order)
        hopeless = ~((strength > 0) & strength.isfinite())
        return linalg.newton_root(factor, strength, order, damping), strength.masked_fill(hopeless, torch.nan)

    return partial(monkeypatch.setattr, linalg, "damped_root", root)


# -------------------------------------------------------------------- numbers


def products(model):
    """ΔW/s = B A of every pair, whatever signs "balanced" has chosen for its coordinates."""
    found = tiny.weights(model)
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in found if "lora_A" in name]
    return torch.cat([(found[b].double() @ found[a].double()).flatten().cpu() for a, b in pairs])


# Tolerances are shares of the distance that the weights went. With weights in fp64, only the factors are in
# fp32: noise of 2e-6 on them and on what is derived from them makes up to 1e-4 in one step, 2e-3 in ten.
FP64 = {1: 2e-3, 10: 3e-2}
# In fp32, Adam gives an entry whose gradient is rounding alone a whole step, up or down. Noise of 3e-7 on all
# weights makes 5e-5 in plain AdamW, 1e-3 in "spectral", whose steps do not go by single entries, 6e-3 in
# "steer", up to 5e-2 in the others.
FP32 = {"none": 1e-3, "spectral": 1e-2, "steer": 5e-2, "inverse": 0.25, "eigenbasis": 0.25, "balanced": 0.25}


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("mode", MODES)
def test_numbers_agree_with_the_host(device, mode, dtype, steps, products_on_the_cpu):
    """On the device roots come from products of matrices, on the host from eigendecompositions."""
    model, optimizer = started("cpu", dtype, precondition=mode)
    before = products(model)
    train(model, optimizer, steps)
    expected = products(model)
    if device == "cpu":
        products_on_the_cpu()
    model, optimizer = started(device, dtype, precondition=mode)
    assert (products(model) - before).norm() <= 1e-6 * before.norm()
    train(model, optimizer, steps)
    assert optimizer.telemetry()["refreshes"] > 0 or mode == "none"
    off, went = (products(model) - expected).norm(), (expected - before).norm()
    assert went > 0
    assert off <= (FP64[steps] if dtype == torch.float64 else FP32[mode]) * went, float(off / went)


def test_state_lives_on_the_device(device):
    model, optimizer = started(device)
    train(model, optimizer, 2)
    found = [c.factors.gradient for c in optimizer.curvature]
    assert [t.device.type for t in found] == [device]
    assert {t.dtype for t in found} == {torch.float32}
    assert {report.status for report in _reports(model, optimizer)} == {"ok"}


def _reports(model, optimizer):
    loss_on(model, 99).backward()
    return optimizer.check_capture()


# -------------------------------------------------------------------- several devices


class OnTwoDevices(nn.Module):
    """Two LoRA pairs, each on a device of its own."""

    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([tiny.HandWritten(6, 6), tiny.HandWritten(6, 6)])
        for layer in self.layers:
            nn.init.normal_(layer.up.weight, std=0.3)
        self.devices = [torch.device(first), torch.device(second)]
        for layer, place in zip(self.layers, self.devices, strict=True):
            layer.to(place)

    def forward(self, x):
        for layer, place in zip(self.layers, self.devices, strict=True):
            x = layer(x.to(place))
        return x

    def sites(self):
        return [Site.from_modules(f"pair{i}", m.down, m.up, m.scaling) for i, m in enumerate(self.layers)]


def trained_on(first, second, mode):
    model = OnTwoDevices(first, second)
    base = torch.optim.AdamW(tiny.trained(model), lr=1e-2)
    optimizer = GritOptimizer(base, model, sites=model.sites(), precondition=mode, kfac_min_samples=8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(32, 6, generator=generator)
        (model(x) - x.flip(1).to(second)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.telemetry()["engaged_sites"] == 2
    return on_cpu(model)


def assert_near(found, expected, tolerance=2e-3):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("mode", ["spectral", "inverse"])
def test_pairs_on_host_and_device(device, mode):
    assert_near(trained_on("cpu", device, mode), trained_on("cpu", "cpu", mode))


@pytest.mark.gpu
def test_pairs_on_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_near(trained_on("cuda:0", "cuda:1", "spectral"), trained_on("cpu", "cpu", "spectral"))


# -------------------------------------------------------------------- precision


def autocast_training(device, dtype, scaler, steps, overflow=()):
    """Losses of a training under autocast; in the steps in ``overflow`` the loss is infinite."""
    model, optimizer = started(device)
    losses = []
    for step in range(steps):
        with torch.autocast(device, dtype):
            loss = loss_on(model, 0)
        losses.append(loss.item())
        scaler.scale(loss * (float("inf") if step in overflow else 1.0)).backward()
        before = on_cpu(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(value, before[name]) for name, value in on_cpu(model).items())
        assert same == (step in overflow)
    return losses, optimizer


def test_bf16_autocast(device):
    losses, optimizer = autocast_training(
        device, torch.bfloat16, torch.amp.GradScaler(device, enabled=False), 8
    )
    assert losses[-1] < losses[0]
    assert optimizer.telemetry()["engaged_sites"] == 14


def test_fp16_autocast_with_a_scaler_and_an_overflow(device):
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    losses, optimizer = autocast_training(device, torch.float16, scaler, 8, overflow=(3,))
    assert scaler.get_scale() == 2.0**9
    assert losses[-1] < losses[0]
    assert optimizer.telemetry()["dropped_folds"] == 0
    assert optimizer.telemetry()["steps"] == 7


def test_nf4(device):
    pytest.importorskip("bitsandbytes")
    workload = Workload("tiny", quantize="nf4", length=16, device=device)
    model = adapted_model(workload)
    optimizer = tiny.grit(model, lr=1e-3)
    (ids,) = batches(workload, 1)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(GRIT|Grit).*")
        for _ in range(5):
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            assert {report.status for report in optimizer.check_capture()} <= {"ok", "unknown"}
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert optimizer.telemetry()["engaged_sites"] == 14


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_goes_on_as_if_never_stopped(device, mode):
    model, optimizer = started(device, precondition=mode)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 4, first=4)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    other, fresh = started(device, precondition=mode)
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(other, fresh, 4, first=4)
    assert {c.factors.gradient.device.type for c in fresh.curvature} == {device}
    assert_near(on_cpu(other), on_cpu(model), 0 if device == "cpu" else 1e-5)


def test_a_copy_goes_on_alone(device):
    model, optimizer = started(device)
    train(model, optimizer, 3)
    other, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, first=3)
    train(other, twin, 2, first=3)
    assert_near(on_cpu(other), on_cpu(model), 0 if device == "cpu" else 1e-5)


def test_a_model_that_moves_takes_its_curvature_along(device):
    """Built on the host and moved before the first step, which then has no curvature yet."""
    model, optimizer = started("cpu")
    model.to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(GRIT|Grit).*")
        train(model, optimizer, 4)
    assert {c.bucket.device.type for c in optimizer.curvature} == {device}
    assert optimizer.telemetry()["engaged_sites"] == 14
    assert {report.status for report in _reports(model, optimizer)} == {"ok"}
