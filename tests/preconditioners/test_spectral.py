"""The direction and the length of a "spectral" step, against the formula written out site by site."""

import itertools
import math

import pytest
import tiny
import torch
from stepping import one_step, sites_of

from grit_optim import GritOptimizer
from grit_optim.base import moments
from grit_optim.preconditioners.modes import mode_named
from grit_optim.preconditioners.spectral import Spectral
from grit_optim.preconditioners.steer import Steer


def polar(matrix, damping=0.01):
    """Singular values brought to s / √(s² + λ), λ in units of the mean squared one."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag(s / (s.square() + damping * s.square().mean()).sqrt()) @ vt


def root_of(factor, damping, power):
    values, vectors = torch.linalg.eigh(
        factor + damping * factor.trace() / len(factor) * torch.eye(len(factor)).double()
    )
    return vectors @ torch.diag(values**-power) @ vectors.mT


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_spectral_orthogonalises_the_momentum_in_fisher_coordinates(weight_decay):
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    model, optimizer, before, gradients = one_step(
        {"precondition": "spectral"}, torch.optim.AdamW, **settings
    )
    after = tiny.weights(model)
    parameters, shares = dict(model.named_parameters()), []
    for a, b, sigma_a, sigma_g in sites_of(model, optimizer):
        for name, factor, left, rms in ((a, sigma_g, True, 0.9), (b, sigma_a, False, 0.6)):
            state = optimizer.state[parameters[name]]
            weight, newest = 1 - 0.6 ** state["step"].item(), gradients[name].double()
            mean = state["exp_avg"].double() / weight
            mixed = 0.6 * mean + 0.4 * newest
            scaled = mixed / state["exp_avg_sq"].double().mean(0 if left else 1, keepdim=True).sqrt()
            root = root_of(factor, 0.3, 0.25)
            direction = root @ polar(root @ scaled) if left else polar(scaled @ root) @ root
            direction[direction * gradients[name].double() < 0] *= 0.3
            turned = 1e-2 * rms * direction / direction.square().mean().sqrt()
            square = state["exp_avg_sq"].double() / (1 - 0.99 ** state["step"].item())
            adam = 1e-2 * mean / (square.sqrt() + 1e-8)  # AdamW's own step at β₁ = 0.6
            share = 1 - (mean * turned).sum() / (mean * adam).sum()
            expected = turned + share.clamp(0, 1) * adam
            earlier = (state["exp_avg"].double() - 0.4 * newest) / (weight - 0.4)
            kept = (2 * (newest * earlier).sum() / earlier.square().sum()).clamp(0, 1)
            longer, length = max(turned.norm(), adam.norm()), expected.norm()
            expected *= ((longer + kept * (length - longer)) / length).clamp(max=1)
            moved = before[name].double() * (1 - 1e-2 * weight_decay) - after[name].double()
            torch.testing.assert_close(moved, expected, rtol=0, atol=2e-3 * expected.norm().item())
            shares.append(share.item())
    assert len(shares) == 28
    assert min(shares) < 0 < max(shares), "both kinds of step, or the test shows less than it says"


def test_spectral_without_curvature_is_the_orthogonalised_gradient(monkeypatch):
    """Power 0 leaves the tokens' curvature out: Muon's direction of SGD's gradient, with SGD's length."""
    monkeypatch.setattr(Spectral, "a_step_ratio", 1.0)
    monkeypatch.setattr(Spectral, "completed", Steer.completed)
    monkeypatch.setattr(Spectral, "caution", 0.0)
    model, _, before, gradients = one_step({"precondition": "spectral", "kfac_power": 0.0})
    after = tiny.weights(model)
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        moved, direction = (before[name] - after[name]).double(), polar(gradient.double())
        expected = 1e-2 * gradient.norm() * direction / direction.norm()
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("mode", ["spectral", "steer"])
def test_step_length_and_ratio_say_how_long_a_step_is(monkeypatch, mode):
    monkeypatch.setattr(mode_named(mode), "a_step_ratio", 2.0)
    monkeypatch.setattr(mode_named(mode), "completed", Steer.completed)
    options = {"precondition": mode, "step_length": 0.25}
    model, _, before, gradients = one_step(options, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    after = tiny.weights(model)
    for name in gradients:
        rms = (before[name] - after[name]).square().mean().sqrt().item()
        assert rms == pytest.approx(1e-2 * 0.25 * (2.0 if "lora_A" in name else 1.0), rel=1e-3)


BASES = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2}),
    "maximize": (torch.optim.AdamW, {"lr": 1e-2, "maximize": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    "plain SGD": (torch.optim.SGD, {"lr": 0.3}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "Muon": (torch.optim.Muon, {"lr": 1e-3}),
}


def steps_of(monkeypatch, optimizer, passes):
    """Each matrix's turned step, average, base's step and whole step, of the passes (closures) in order."""
    calls, completed = [], Spectral.completed

    def noted(self, held, move, average, descent):
        """Keep what the step was made of."""
        parts = move.clone(), average.fresh, descent.clone()  # the two are written into
        whole = yield from completed(self, held, move, average, descent)
        calls[-1] += zip(*parts, whole.clone(), strict=True)
        return whole

    monkeypatch.setattr(Spectral, "completed", noted)
    for one in passes:
        calls.append([])
        one().backward()
        optimizer.step()
        optimizer.zero_grad()
    return calls


def lengths(turned, average, base):
    """Norm of the longer of two steps, and that of the turned one with what it lacks of the base's."""
    share = (1 - torch.sum(average * turned) / torch.sum(average * base)).clamp(0, 1)
    return max(turned.norm().item(), base.norm().item()), (turned + share * base).norm().item()


@pytest.mark.parametrize("name", BASES)
def test_a_spectral_step_takes_what_its_decrease_lacks_of_the_bases_own(monkeypatch, name):
    """The decrease is to first order, along the average. A sum that is longer than both may lose some."""
    kind, settings = BASES[name]
    model = tiny.llama(init_lora_weights=False)
    optimizer = GritOptimizer(kind(tiny.trained(model), **settings), model, kfac_min_samples=1)
    passes = [lambda seed=seed: tiny.loss_of(model, seed) for seed in range(4)]
    enough, lacking = 0, 0
    for turned, average, base, whole in itertools.chain(*steps_of(monkeypatch, optimizer, passes)):
        own, some, ours = (torch.sum(average * step).item() for step in (base, turned, whole))
        if some >= own:
            assert torch.equal(turned, whole)
            enough += 1
        else:  # all of the base's step where the turned one goes up the average
            longer, length = lengths(turned, average, base)
            size = whole.norm().item()
            assert min(longer, length) * (1 - 1e-5) <= size <= length * (1 + 1e-5)
            assert ours == pytest.approx(size / length * (own + min(some, 0)), rel=1e-3)
            lacking += 1
    assert lacking
    assert enough + lacking == 4 * 28


@pytest.mark.parametrize("name", [name for name in BASES if "plain" not in name and name != "RMSprop"])
@pytest.mark.parametrize("agreeing", [True, False])
def test_a_sum_is_longer_than_its_parts_only_while_gradients_agree(monkeypatch, name, agreeing):
    """One batch at a learning rate of next to nothing, or that batch with the sign of its loss in turns."""
    kind, settings = BASES[name]
    model = tiny.llama(init_lora_weights=False)
    base = kind(tiny.trained(model), **{**settings, "lr": 1e-7})
    optimizer = GritOptimizer(base, model, kfac_min_samples=1)
    signs = [1 if agreeing or step % 2 else -1 for step in range(8)]
    passes = [lambda sign=sign: sign * tiny.loss_of(model) for sign in signs]
    longer_sums = 0
    for turned, average, base_step, whole in itertools.chain(*steps_of(monkeypatch, optimizer, passes)[1:]):
        if torch.sum(average * turned) >= torch.sum(average * base_step):
            continue
        longer, length = lengths(turned, average, base_step)
        assert whole.norm().item() == pytest.approx(length if agreeing else min(longer, length), rel=1e-3)
        longer_sums += length > longer
    assert longer_sums or not agreeing


@pytest.mark.parametrize("mode", ["spectral", "steer"])
def test_full_caution_never_goes_up_the_newest_gradient(monkeypatch, mode):
    moved = {}
    monkeypatch.setattr(mode_named(mode), "a_step_ratio", 1.0)
    monkeypatch.setattr(mode_named(mode), "completed", Steer.completed)
    for caution in (0.0, 1.0):
        monkeypatch.setattr(mode_named(mode), "caution", caution)
        options, settings = {"precondition": mode}, {"lr": 1e-2, "weight_decay": 0.0}
        model, _, before, gradients = one_step(options, torch.optim.AdamW, **settings)
        after = tiny.weights(model)
        moved[caution] = {name: before[name] - after[name] for name in gradients}
    uphill = {
        caution: [(step * gradients[name] < 0).any() for name, step in moved[caution].items()]
        for caution in moved
    }
    assert len(uphill[1.0]) == 28
    assert not any(uphill[1.0])
    assert all(uphill[0.0]), "without caution every matrix has such an entry, or the test shows nothing"


def test_a_site_whose_gradient_is_zero_stays_where_it_is():
    """A fixed length must not move what the base leaves alone: A while B is zero."""
    model = tiny.llama()
    before = tiny.weights(model)
    base = torch.optim.AdamW(tiny.trained(model), lr=1e-2, weight_decay=0.0)
    tiny.train(model, GritOptimizer(base, model, kfac_min_samples=1), 1)
    after = tiny.weights(model)
    moved = {name: not torch.equal(before[name], after[name]) for name in before}
    assert len(moved) == 28
    assert all(is_moved == ("lora_B" in name) for name, is_moved in moved.items())


@pytest.mark.parametrize("mode", ["spectral", "steer"])
@pytest.mark.parametrize("absent", [0.0, math.nan], ids=["zero", "not finite"])
def test_without_a_gradient_a_step_fades_out_with_the_bases_average(mode, absent):
    """An expert that sees no token has zero gradients; it must not go on at full length along its last."""
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model, precondition=mode, step_length=0.6, direction_momentum=0.6)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    tiny.train(model, optimizer, 6)
    moved = []
    for seed in range(6, 46):
        before = tiny.weights(model)
        (absent * tiny.loss_of(model, seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(
            max((after - before[name]).abs().max().item() for name, after in tiny.weights(model).items())
        )
    assert moved[0] > 1e-4, "the average still moves the weights, or the test shows nothing"
    assert moved[-1] < 1e-6
    assert all(value.isfinite().all() for value in tiny.weights(model).values())


@pytest.mark.parametrize("mode", ["spectral", "steer"])
def test_a_freshened_average_leaves_the_bases_length_what_that_momentum_gives(mode):
    """Adam's bias correction divides by 1 − β₁ᵗ; the average that was freshened has the weight 1 − wᵗ."""
    lengths = {}
    for beta1, momentum in ((0.9, 0.6), (0.6, "base")):
        model = tiny.llama(layers=1)
        base = torch.optim.AdamW(tiny.trained(model), lr=1e-2, betas=(beta1, 0.999), weight_decay=0.0)
        options = {"step_length": "base", "direction_momentum": momentum, "kfac_min_samples": 8}
        optimizer = GritOptimizer(base, model, precondition=mode, **options)
        lengths[beta1] = []
        for seed in range(8):
            before = tiny.weights(model)
            tiny.train(model, optimizer, 1, first=seed)
            steps = [(after - before[name]).norm() for name, after in tiny.weights(model).items()]
            lengths[beta1].append(torch.stack(steps).norm())
    # A has its first gradient in the second step.
    ours, expected = (torch.stack(lengths[beta1][2:]) for beta1 in (0.9, 0.6))
    torch.testing.assert_close(ours, expected, rtol=0.25, atol=0)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.7, 0.99)), 3),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.7), 200),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.7, dampening=0.7), 200),
    ],
)
def test_the_weight_of_a_moment_makes_it_a_mean_of_gradients(make, steps):
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    base = make([parameter])
    for _ in range(steps):
        parameter.grad = torch.full((2, 3), 5.0)
        base.step()
    moment = moments.first_moment(base, parameter)
    weight = moments.moment_weight(base, [parameter], base.param_groups[0], 0.7)
    torch.testing.assert_close(moment / weight, torch.full((2, 3), 5.0))
