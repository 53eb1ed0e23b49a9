"""What a step costs a device: no waiting, no growing memory, no more kernels for more sites."""

import contextlib
import gc

import pytest
import tiny
import torch
from on_devices import WAITING_FOR_NOTHING, loss_on, started, train
from torch import nn

from benchmarks.cost.kernels import profiled


@contextlib.contextmanager
def no_waiting(device):
    """An error wherever the host would wait for the device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", WAITING_FOR_NOTHING)
def test_a_step_waits_for_nothing(device, mode):
    model, optimizer = started(device, precondition=mode)
    train(model, optimizer, 6)  # the first ones compare taps and gradients
    for seed in range(3):
        loss_on(model, seed).backward()
        with no_waiting(device):
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.telemetry()["steps"] == 9


@pytest.mark.gpu
def test_waiting_is_noticed():
    value = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting("cuda"):
        value.item()


def held(device):
    """Bytes that tensors hold: what the allocator has given out, or on the CPU what Python can see."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == device]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("mode", ["spectral", "eigenbasis"])
def test_memory_does_not_grow(device, mode):
    model, optimizer = started(device, precondition=mode)
    train(model, optimizer, 20)
    before = held(device)
    train(model, optimizer, 80, first=20)
    assert held(device) <= before  # what other tests left may go in between


def kernels_of_a_step(device, layers, mode):
    """Kernels of one step in the steady state without the base's own; on the CPU its operations."""
    model = tiny.llama(layers=layers).to(device)
    optimizer = tiny.grit(model, precondition=mode)
    train(model, optimizer, 6)
    loss_on(model, 9).backward()
    optimizer.base.step = lambda: None
    found, _ = profiled(optimizer.step, device)
    return next(iter(found.values()))


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced"])
def test_kernels_do_not_grow_with_the_number_of_sites(device, mode):
    """A library may cut a batch of products in two, so a few more are no loop over the sites."""
    few, many = kernels_of_a_step(device, 2, mode), kernels_of_a_step(device, 5, mode)
    assert few > 50
    assert many <= 1.1 * few
