"""A step reads nothing back from the device: it runs on the meta device, whose tensors have no values."""

import pytest
import support
import torch
from tiny import grit, llama, tokens
from torch.utils._python_dispatch import TorchDispatchMode

# On CUDA these look at their error code, and so wait for the device; the forms that end in _ex do not.
WAITING = (
    *("linalg_eigh", "linalg_eig", "linalg_svd", "linalg_cholesky.", "linalg_inv.", "cholesky_inverse"),
    *("nonzero", "masked_select", "local_scalar_dense", "equal"),
)


class Watch(TorchDispatchMode):
    """Collects the operations that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.").lstrip("_")
        on_device = any(isinstance(a, torch.Tensor) and a.device.type != "cpu" for a in args)
        if on_device and name.startswith(WAITING):
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


def waited_for(mode, steps=3, **options):
    """What the steps of a model on the meta device would wait for, without the checks of the first steps."""
    model = llama().to("meta")
    optimizer = grit(model, precondition=mode, **options)
    support.parts(optimizer).capture.watch.steps_left = 0  # comparing taps and gradients does read values
    waiting = set()
    for _ in range(steps):
        ids = tokens().to("meta")
        model(input_ids=ids, labels=ids).loss.backward()
        with Watch() as watch:
            optimizer.step()
        optimizer.zero_grad()
        waiting |= set(watch.waiting)
    assert support.parts(optimizer).preconditioning.refreshes > 0
    return waiting


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "none"])
def test_a_step_waits_for_nothing(mode):
    assert waited_for(mode) == set()


@pytest.mark.parametrize(
    "options", [{"kfac_power": 1.0}, {"max_grad_norm": 1.0}, {"step_length": "base"}], ids=str
)
def test_nor_does_it_with_options(options):
    assert waited_for("spectral", **options) == set()


@pytest.mark.parametrize("mode", ["eigenbasis", "balanced"])
def test_an_eigendecomposition_is_the_one_thing_that_waits(mode):
    assert waited_for(mode) == {"linalg_eigh.default"}


def test_the_watch_sees_what_waits():
    with Watch() as watch:
        torch.linalg.eigh(torch.empty(2, 2, device="meta"))
    assert watch.waiting == ["linalg_eigh.default"]
