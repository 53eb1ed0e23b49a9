"""Each pair's moments are read by its own count of steps, whatever other pairs of the batch do."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from twin import warm

from grit_optim import GritOptimizer, Site

MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]
STILL = [
    mode for mode in MODES if mode != "balanced"
]  # that one moves all pairs in the steps of one schedule
STEPS = 6
# With units of each step's own, and a unit of the loss that all pairs share, no pair would be as it is alone.
ALONE = {"kfac_min_samples": 4, "damping": "absolute", "kfac_update_freq": 1}


def moved(active, mode, **options):
    """The weights of each of several layers with a loss of its own, of which ``active[step]`` are trained."""
    members = sorted(set().union(*active))
    layers = {i: warm(made(i)) for i in members}
    model = nn.ModuleDict({str(i): layer for i, layer in layers.items()})
    sites = [Site.from_modules(str(i), layer.down, layer.up, layer.scaling) for i, layer in layers.items()]
    base = torch.optim.AdamW([p for s in sites for p in (s.a, s.b)], lr=1e-2)
    optimizer = GritOptimizer(base, model, sites=sites, precondition=mode, **{**ALONE, **options})
    for step, chosen in enumerate(active):
        for i in chosen:
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(100 * i + step))
            (layers[i](x) - x[:, :5].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {i: [(layer.up.weight @ layer.down.weight).detach()] for i, layer in layers.items()}


def made(seed):
    torch.manual_seed(seed)
    return tiny.HandWritten()


@settings(max_examples=3, deadline=None, derandomize=True)
@given(skipped=st.lists(st.sets(st.sampled_from([0, 2])), min_size=STEPS, max_size=STEPS))
@pytest.mark.parametrize("mode", MODES)
def test_a_pair_beside_others_that_skip_steps_moves_as_it_does_alone(mode, skipped):
    """Pair 1 is trained in each step; 0 and 2, before and after it in the batch, in some."""
    beside = moved([{0, 1, 2} - gone for gone in skipped], mode)
    alone = moved([{1}] * STEPS, mode)
    for ours, expected in zip(beside[1], alone[1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "momentum"), [*((m, "base") for m in STILL), ("spectral", 0.6), ("steer", 0.6)]
)
def test_a_pair_that_skips_steps_moves_as_it_does_alone(mode, momentum):
    """The steps that it takes are those in which it is trained, and its factors know of no others."""
    taken = [0, 3, 4]
    options = {"direction_momentum": momentum} if mode in ("spectral", "steer") else {}
    beside = moved([{0, 1} if step in taken else {0} for step in range(STEPS)], mode, **options)
    alone = moved([{1} if step in taken else set() for step in range(STEPS)], mode, **options)
    for ours, expected in zip(beside[1], alone[1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_unfrozen_later_in_one_group_or_in_a_group_of_their_own(mode):
    runs = []
    for apart in (False, True):
        model = tiny.llama(layers=2, target_modules=["q_proj"])
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        of = dict(model.named_parameters())
        early, late = ([of[n] for n in names if f"layers.{i}" in n] for i in (0, 1))
        groups = [{"params": early}, {"params": late}] if apart else [{"params": early + late}]
        for p in late:
            p.requires_grad_(False)
        optimizer = GritOptimizer(
            torch.optim.AdamW(groups, lr=1e-2), model, precondition=mode, kfac_min_samples=8
        )
        tiny.train(model, optimizer, 4)
        for p in late:
            p.requires_grad_()
        tiny.train(model, optimizer, 3, first=4)
        runs.append(tiny.weights(model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("momentum", "dampening"), [(0.9, 1.0), (1.0, 0.0), (0.9, 1.5)])
def test_an_average_whose_weights_have_no_sum_is_taken_as_it_is(rank, momentum, dampening):
    """SGD's buffer takes in no gradient but the first, or forgets none; the step is turned all the same."""
    runs = []
    for wrap in (True, False):
        torch.manual_seed(0)
        layer = warm(tiny.HandWritten(rank=rank))
        pair = Site.from_modules("it", layer.down, layer.up)
        base = torch.optim.SGD([pair.a, pair.b], lr=1e-2, momentum=momentum, dampening=dampening)
        optimizer = GritOptimizer(base, layer, sites=[pair], kfac_min_samples=1) if wrap else base
        for step in range(5):
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(step))
            (layer(x) - x[:, :5].sin()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([pair.a.detach(), pair.b.detach()])
    for ours, plain in zip(*runs, strict=True):
        assert ours.isfinite().all()
        assert not torch.equal(ours, plain)
