"""What each way to use the curvature does to a step, against the formula written out site by site."""

import copy

import pytest
import support
import tiny
import torch
from stepping import one_step, sites_of

from grit_optim import GritOptimizer, presets
from grit_optim.preconditioners.held_gradients import Held
from grit_optim.preconditioners.modes import mode_named

MODES = ("spectral", "steer", "eigenbasis", "balanced", "inverse")


def inverse_of(factor, damping, relative=True):
    strength = damping * factor.trace() / len(factor) if relative else damping
    return torch.linalg.inv(factor + strength * torch.eye(len(factor)).double())


@pytest.mark.parametrize("pairing", ["kfac", "paper"])
@pytest.mark.parametrize("damping", ["relative", "absolute"])
def test_inverse_multiplies_the_gradients_by_the_damped_inverses(pairing, damping):
    options = {"precondition": "inverse", "pairing": pairing, "damping": damping, "step_length": "natural"}
    model, optimizer, before, gradients = one_step({**options, "kfac_damping": 0.05})
    after, checked = tiny.weights(model), 0
    for a, b, sigma_a, sigma_g in sites_of(model, optimizer):
        for_a, for_b = (sigma_g, sigma_a) if pairing == "kfac" else (sigma_a, sigma_g)
        natural_a = inverse_of(for_a, 0.05, damping == "relative") @ gradients[a].double()
        natural_b = gradients[b].double() @ inverse_of(for_b, 0.05, damping == "relative")
        for name, natural in ((a, natural_a), (b, natural_b)):
            moved = (before[name] - after[name]).double()
            torch.testing.assert_close(
                moved, 1e-2 * natural, rtol=1e-3, atol=1e-3 * 1e-2 * natural.abs().max().item()
            )
            checked += 1
    assert checked == 28


def test_inverse_keeps_the_norm_of_each_gradient_by_default():
    model, _, before, gradients = one_step({"precondition": "inverse"})
    after = tiny.weights(model)
    for name, gradient in gradients.items():
        moved = (before[name] - after[name]) / 1e-2
        assert moved.norm().item() == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert not torch.allclose(moved, gradient, rtol=1e-2), "the direction is another"


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steer_keeps_adams_length_and_takes_the_natural_direction(weight_decay):
    settings = {"lr": 1e-2, "betas": (0.6, 0.99), "weight_decay": weight_decay}
    model, optimizer, before, _ = one_step(
        {"precondition": "steer", "kfac_damping": 0.03}, torch.optim.AdamW, **settings
    )
    after = tiny.weights(model)
    parameters = dict(model.named_parameters())
    for a, b, sigma_a, sigma_g in sites_of(model, optimizer):
        for name, factor, left in ((a, sigma_g, True), (b, sigma_a, False)):
            state = optimizer.state[parameters[name]]
            step = state["step"].item()
            m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
            adam = 1e-2 * (m / (1 - 0.6**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
            scaled = m / v.mean(0 if left else 1, keepdim=True).sqrt()
            natural = inverse_of(factor, 0.03) @ scaled if left else scaled @ inverse_of(factor, 0.03)
            moved = before[name].double() * (1 - 1e-2 * weight_decay) - after[name].double()
            torch.testing.assert_close(moved.norm(), adam.norm(), rtol=1e-3, atol=0)
            torch.testing.assert_close(moved / moved.norm(), natural / natural.norm(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("settings", "of"), [({}, "gradient"), ({"momentum": 0.9}, "momentum")])
def test_steer_takes_the_gradient_or_momentum_of_sgd(settings, of):
    model, optimizer, before, gradients = one_step(
        {"precondition": "steer", "kfac_damping": 0.03}, torch.optim.SGD, **settings
    )
    after = tiny.weights(model)
    parameters = dict(model.named_parameters())
    for a, _, _, sigma_g in sites_of(model, optimizer):
        m = gradients[a] if of == "gradient" else optimizer.state[parameters[a]]["momentum_buffer"]
        natural = inverse_of(sigma_g, 0.03) @ m.double()
        expected = 1e-2 * m.norm() * natural / natural.norm()
        torch.testing.assert_close(
            (before[a] - after[a]).double(), expected, rtol=1e-2, atol=1e-2 * m.norm().item() * 1e-3
        )


def test_eigenbasis_is_adam_on_rotated_gradients():
    """With fixed eigenbases, Adam's moments are of the rotated gradient and the step is rotated back."""
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition="eigenbasis", kfac_update_freq=1000)
    support.parts(optimizer).schedule.steps = 1  # step 0 would refresh with nothing to go by
    tiny.train(model, optimizer, 2)
    support.mode(optimizer).refresh(optimizer.curvature[0])
    reference = copy.deepcopy(dict(model.named_parameters()))
    start = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters() if p.requires_grad}
    tiny.loss_of(model, 50).backward()
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    curvature, after = optimizer.curvature[0], tiny.weights(model)
    names = {id(p): n for n, p in model.named_parameters()}
    for i, site in enumerate(curvature.bucket.sites):
        name, basis = names[id(site.a)], curvature.a_operator[i].double()
        g = basis.mT @ gradients[name]
        m = 0.9 * start[name]["exp_avg"].double() + 0.1 * g
        v = 0.999 * start[name]["exp_avg_sq"].double() + 0.001 * g.square()
        step = start[name]["step"].item() + 1
        adam = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        rotated = basis.mT @ reference[name].detach().double() * (1 - 1e-2 * 1e-2)
        torch.testing.assert_close(
            after[name].double(), basis @ (rotated - 1e-2 * adam), rtol=1e-4, atol=1e-5
        )


def test_turning_the_basis_moves_the_first_moment_exactly():
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition="eigenbasis", kfac_update_freq=2)
    tiny.train(model, optimizer, 6)
    curvature = optimizer.curvature[0]
    moments = [optimizer.state[s.a]["exp_avg"].clone() for s in curvature.bucket.sites]
    plain = [q @ m for q, m in zip(curvature.a_operator, moments, strict=True)]
    tiny.loss_of(model).backward()
    support.mode(optimizer).refresh(curvature)
    for i, site in enumerate(curvature.bucket.sites):
        now = curvature.a_operator[i] @ optimizer.state[site.a]["exp_avg"]
        torch.testing.assert_close(now, plain[i], rtol=1e-4, atol=1e-6 * plain[i].abs().max().item() + 1e-9)


def test_close_leaves_the_first_moments_in_the_coordinates_of_the_weights():
    """So that the base can go on alone, or be saved for it."""
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition="eigenbasis")
    tiny.train(model, optimizer, 5)
    curvature = optimizer.curvature[0]
    turned = [
        q @ optimizer.state[s.a]["exp_avg"]
        for q, s in zip(curvature.a_operator, curvature.bucket.sites, strict=True)
    ]
    assert len(turned) == 14
    optimizer.close()
    for plain, site in zip(turned, curvature.bucket.sites, strict=True):
        torch.testing.assert_close(
            optimizer.base.state[site.a]["exp_avg"], plain, rtol=1e-4, atol=1e-6 * plain.abs().max()
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_base_that_fails_leaves_weights_and_gradients_as_they_were(mode):
    """The eigenbasis turns the weights for the base's step; they must not stay so."""
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition=mode, kfac_update_freq=100)
    tiny.train(model, optimizer, 3)
    parts = support.parts(optimizer)
    parts.schedule.steps = 100
    tiny.loss_of(model, 9).backward()
    with torch.no_grad():
        parts.curvature.fold(parts.capture.collect())
        parts.refresh_if_due()
    before, gradients = tiny.weights(model), [p.grad for p in tiny.trained(model)]

    def fail(closure=None):
        raise RuntimeError("out of memory")

    optimizer.base.step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    after = tiny.weights(model)
    assert len(before) == 28
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(tiny.trained(model), gradients, strict=True))


def test_eigenbasis_with_sgd_is_plain_sgd():
    """SGD does not care for the basis: a rotation in and out changes nothing."""
    after = [tiny.weights(one_step(o)[0]) for o in ({"precondition": "eigenbasis"}, {"precondition": "none"})]
    assert len(after[0]) == 28
    for name, value in after[0].items():
        torch.testing.assert_close(value, after[1][name], rtol=1e-4, atol=1e-6)


def test_balanced_coordinates_leave_the_logits_and_make_both_factors_diagonal():
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition="none", fisher_decay=None, kfac_damping=1e-7)
    tiny.train(model, optimizer, 5)
    ids = tiny.tokens(7)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    balanced = mode_named("balanced")(optimizer.base, optimizer.options.preconditioning)
    with torch.no_grad():
        for curvature in optimizer.curvature:
            balanced.refresh(curvature)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    for curvature in optimizer.curvature:
        ratios = []
        of_a, of_b = curvature.a_operator, curvature.b_operator  # T⁻ᵀ and Tᵀ
        for factor in (
            of_b.mT @ curvature.factors.activation @ of_b,
            of_a @ curvature.factors.gradient @ of_a.mT,
        ):
            diagonal = factor.diagonal(dim1=1, dim2=2)
            off = factor - torch.diag_embed(diagonal)
            assert (off.abs().amax((1, 2)) < 1e-2 * diagonal.amax(1)).all()
            ratios.append(diagonal / diagonal.sum(1, keepdim=True))
        torch.testing.assert_close(ratios[0], ratios[1], rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("mode", ["balanced", "eigenbasis"])
def test_moments_follow_the_bases_coordinates_and_weights_keep_theirs(mode):
    """⟨A, m_A⟩ in the base's coordinates does not depend on these, nor does ⟨B, m_B⟩."""
    model = tiny.llama()
    base = torch.optim.SGD(tiny.trained(model), lr=1e-2, momentum=0.9)
    optimizer = GritOptimizer(base, model, precondition=mode, kfac_min_samples=8, kfac_update_freq=1000)
    tiny.train(model, optimizer, 4)
    curvature, way = optimizer.curvature[0], support.mode(optimizer)

    def products():
        found = []
        for group in curvature.bucket.groups:
            held = Held(curvature, group, {}, [], None, torch.empty(0))
            turned = way.turn(held, group.stack(group.parameters))
            moments = group.stack([optimizer.state[p]["momentum_buffer"] for p in group.parameters])
            found.append((turned * moments).sum((1, 2)))
        return torch.cat(found)

    with torch.no_grad():
        before, weights, buffer = products(), tiny.weights(model), curvature.bucket.sites[0].a
        moment = optimizer.state[buffer]["momentum_buffer"].clone()
        way.refresh(curvature)
        torch.testing.assert_close(products(), before, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(optimizer.state[buffer]["momentum_buffer"], moment, rtol=1e-2, atol=0)
        for name, value in tiny.weights(model).items():
            assert torch.equal(value, weights[name])


@pytest.mark.parametrize("mode", MODES)
def test_warm_up_is_exactly_the_base(mode):
    models = [tiny.llama(), tiny.llama()]
    tiny.train(models[0], tiny.grit(models[0], precondition=mode, ng_warmup_steps=4), 4)
    tiny.train(models[1], tiny.adamw(models[1]), 4)
    expected = tiny.weights(models[1])
    assert len(expected) == 28
    for name, value in tiny.weights(models[0]).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_too_few_samples_leave_the_base_alone(mode):
    models = [tiny.llama(), tiny.llama()]
    tiny.train(models[0], tiny.grit(models[0], precondition=mode, kfac_min_samples=10**6), 4)
    tiny.train(models[1], tiny.adamw(models[1]), 4)
    expected = tiny.weights(models[1])
    for name, value in tiny.weights(models[0]).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_max_grad_norm_bounds_what_the_base_sees(mode):
    model = tiny.llama()
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.stack([p.grad.norm() for p in tiny.trained(model)]).norm().item())
            return super().step(closure)

    optimizer = GritOptimizer(
        Watching(tiny.trained(model), lr=1e-2),
        model,
        precondition=mode,
        max_grad_norm=1e-3,
        kfac_min_samples=8,
    )
    tiny.train(model, optimizer, 4)
    assert len(seen) == 4
    assert max(seen) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_users_gradients_are_untouched(mode):
    """Whoever logs gradients after the step sees those of the loss."""
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition=mode)
    tiny.train(model, optimizer, 2)
    tiny.loss_of(model, 5).backward()
    before = [(p.grad, p.grad.clone()) for p in tiny.trained(model)]
    optimizer.step()
    for parameter, (tensor, value) in zip(tiny.trained(model), before, strict=True):
        assert parameter.grad is tensor
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_every_mode_lowers_the_loss(mode):
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition=mode, kfac_update_freq=3)

    def same_batch():
        loss = tiny.loss_of(model, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [same_batch() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.15


def test_paper_preset_names_every_default_of_the_seed():
    seed = {
        "kfac_update_freq": 50, "kfac_min_samples": 64, "kfac_damping": 1e-3, "reprojection_freq": 50,
        "reprojection_k": 8, "reprojection": "two_sided", "cov_update_freq": 15,
        "rank_adaptation_threshold": 0.99, "min_lora_rank": 4, "rank_adaptation_start_step": 0,
        "reprojection_warmup_steps": 0, "ng_warmup_steps": 0, "kfac_inversion_device": "cpu",
    }  # fmt: skip
    assert {name: presets.PAPER[name] for name in seed} == seed
    long_run = {
        "kfac_min_samples": 192, "kfac_update_freq": 150, "kfac_damping": 0.003, "reprojection_freq": 300,
        "reprojection_warmup_steps": 500, "rank_adaptation_start_step": 500,
    }  # fmt: skip
    assert {name: presets.PAPER_LONG_RUN[name] for name in long_run} == long_run
    for preset in (presets.PAPER, presets.PAPER_LONG_RUN):
        model = tiny.llama()
        tiny.train(model, GritOptimizer(tiny.adamw(model), model, **preset), 3)
