"""What leaves a step is in the coordinates of before, so that averages over steps mean something."""

import pytest
import tiny
import torch
from twin import warm

from grit_optim import GritOptimizer

MODES = ("spectral", "steer", "eigenbasis", "balanced", "inverse", "none")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reprojection", ["none", "balanced"])
def test_a_base_that_does_not_move_leaves_every_bit(mode, reprojection):
    """At a rate of 0, whatever moved would be the coordinates."""
    model = warm(tiny.llama(layers=1))
    base = torch.optim.SGD(tiny.trained(model), lr=0.0, momentum=0.9)
    often = {"kfac_update_freq": 1, "reprojection": reprojection, "reprojection_freq": 2}
    optimizer = GritOptimizer(base, model, precondition=mode, kfac_min_samples=8, **often)
    before = tiny.weights(model)
    tiny.train(model, optimizer, 5)
    for name, value in tiny.weights(model).items():
        assert torch.equal(value, before[name]), name


def test_after_the_last_cut_coordinates_stay():
    model = warm(tiny.llama(layers=1))
    base = torch.optim.SGD(tiny.trained(model), lr=0.0)
    often = {"reprojection": "balanced", "reprojection_freq": 2, "reprojection_k": 2}
    optimizer = GritOptimizer(base, model, precondition="none", kfac_min_samples=8, **often)
    tiny.train(model, optimizer, 2)
    assert set(optimizer.ranks().values()) == {2}
    before = tiny.weights(model)
    tiny.train(model, optimizer, 6, first=2)
    assert optimizer.telemetry()["reprojections"] == 4
    for name, value in tiny.weights(model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", ["eigenbasis", "balanced"])
def test_an_average_of_the_bases_own_is_in_the_coordinates_of_the_weights(mode):
    """At a rate of 0, schedule-free's averaged weights, those for evaluation, are the weights."""
    schedulefree = pytest.importorskip("schedulefree")
    model = warm(tiny.llama(layers=1))
    base = schedulefree.AdamWScheduleFree(tiny.trained(model), lr=0.0)
    base.train()
    optimizer = GritOptimizer(base, model, precondition=mode, kfac_update_freq=1, kfac_min_samples=8)
    before = tiny.weights(model)
    tiny.train(model, optimizer, 4)
    optimizer.eval()
    for name, value in tiny.weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
