"""The two penalties: their gradients against autograd, their place in the step, their warm-up."""

import pytest
import support
import tiny
import torch
from stepping import one_step, sites_of

from grit_optim import GritOptimizer, presets
from grit_optim.preconditioners import penalties
from grit_optim.rank.selection import rank_for_energy

BOTH = {"lambda_kfac": 0.03, "lambda_reproj": 0.2, "reprojection_k": 2, "damping": "absolute"}


def leading_projector(factor, k):
    vectors = torch.linalg.eigh(factor)[1].flip(-1)[:, :k]
    return vectors @ vectors.T


def penalty(a, b, sigma_a, sigma_g, onto_a, onto_g, lambda_kfac, lambda_reproj):
    """The two penalties as the paper writes them."""
    eye = torch.eye(len(sigma_a), dtype=a.dtype)
    curvature = torch.trace(a.T @ sigma_a @ a) + torch.trace(b @ sigma_g @ b.T)
    outside = ((eye - onto_a) @ a).square().sum() + (b @ (eye - onto_g)).square().sum()
    return lambda_kfac * curvature + lambda_reproj * outside


def by_autograd(a, b, *rest):
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    return torch.autograd.grad(penalty(a, b, *rest), (a, b))


def expected(optimizer, model, before, k=2, one_sided=False):
    """Name to the gradient of the penalties at ``before``, with the optimizer's factors."""
    options, gradients = optimizer.options.penalties, {}
    for a, b, sigma_a, sigma_g in sites_of(model, optimizer):
        rank = k if k else int(rank_for_energy(torch.linalg.eigvalsh(sigma_a).flip(0)[None], 0.9))
        onto_a = leading_projector(sigma_a, rank)
        onto_g = onto_a if one_sided else leading_projector(sigma_g, rank)
        strengths = options.lambda_kfac, options.lambda_reproj
        gradients[a], gradients[b] = by_autograd(
            before[a], before[b], sigma_a, sigma_g, onto_a, onto_g, *strengths
        )
    assert len(gradients) == 28
    return gradients


def assert_moved_by(model, before, gradients, lr=1e-2):
    after = tiny.weights(model)
    for name, gradient in gradients.items():
        moved = (before[name] - after[name]).double() / lr
        torch.testing.assert_close(
            moved, gradient.double(), rtol=1e-3, atol=1e-5 * gradient.abs().max().item(), msg=name
        )


def test_operators_are_the_gradients_of_the_formula():
    """In float64, on random factors and projectors."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    a, b, rows_a, rows_g = draw(3, 4, 6), draw(3, 5, 4), draw(3, 9, 4), draw(3, 9, 4)
    sigma_a, sigma_g = rows_a.mT @ rows_a, rows_g.mT @ rows_g
    onto_a, onto_g = (torch.stack([leading_projector(m, 2) for m in sigma]) for sigma in (sigma_a, sigma_g))
    for_a, for_b = penalties.operators(sigma_a, sigma_g, onto_a, onto_g, 0.3, 0.7)
    for i in range(3):
        grad_a, grad_b = by_autograd(a[i], b[i], sigma_a[i], sigma_g[i], onto_a[i], onto_g[i], 0.3, 0.7)
        torch.testing.assert_close(for_a[i] @ a[i], grad_a, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b[i] @ for_b[i], grad_b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change", [{}, {"lambda_kfac": 0.0}, {"lambda_reproj": 0.0}], ids=["both", "reproj", "kfac"]
)
def test_the_base_sees_the_losss_gradient_and_the_penalties(change):
    model, optimizer, before, gradients = one_step({"precondition": "none", **BOTH, **change})
    extra = expected(optimizer, model, before)
    assert min(float(e.norm()) for e in extra.values()) > 0
    assert_moved_by(model, before, {name: gradients[name] + extra[name] for name in extra})


def test_one_sided_reprojection_uses_the_activations_directions_for_both():
    options = {**BOTH, "precondition": "none", "reprojection": "one_sided", "reprojection_freq": 10**6}
    model, optimizer, before, gradients = one_step({**options, "reprojection_warmup_steps": 10**6})
    extra = expected(optimizer, model, before, one_sided=True)
    assert_moved_by(model, before, {name: gradients[name] + extra[name] for name in extra})


def test_the_rank_follows_the_adaptation():
    options = {"rank_adaptation_threshold": 0.9, "min_lora_rank": 1}
    never = {"reprojection": "two_sided", "reprojection_warmup_steps": 10**6}
    model, optimizer, before, gradients = one_step({"precondition": "none", **BOTH, **options, **never})
    extra = expected(optimizer, model, before, k=None)
    assert_moved_by(model, before, {name: gradients[name] + extra[name] for name in extra})


def test_the_preconditioner_does_not_see_the_penalties():
    """The documented order: Σ⁻¹∇ first, then the penalties' gradient as it is."""
    options = {"precondition": "inverse", "step_length": "natural", "kfac_damping": 0.05, **BOTH}
    model, optimizer, before, gradients = one_step(options)
    extra, natural = expected(optimizer, model, before), {}
    for a, b, sigma_a, sigma_g in sites_of(model, optimizer):
        eye = torch.eye(4).double()
        natural[a] = torch.linalg.solve(sigma_g + 0.05 * eye, gradients[a].double())
        natural[b] = torch.linalg.solve(sigma_a + 0.05 * eye, gradients[b].double().T).T
    assert_moved_by(model, before, {name: natural[name] + extra[name] for name in extra})


def test_in_the_eigenbasis_the_penalties_are_turned_with_the_gradient():
    """SGD does not care for the basis, so the step is that of plain coordinates."""
    model, optimizer, before, gradients = one_step(
        {"precondition": "eigenbasis", "kfac_update_freq": 1, **BOTH}
    )
    extra = expected(optimizer, model, before)
    assert_moved_by(model, before, {name: gradients[name] + extra[name] for name in extra})


def test_the_norms_bound_holds_with_the_penalties():
    model, _, before, _ = one_step({"precondition": "none", "max_grad_norm": 1e-3, **BOTH})
    after = tiny.weights(model)
    moved = torch.stack([(before[n] - after[n]).norm() for n in before]).norm() / 1e-2
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_warm_up_grows_on_a_straight_line():
    """In its fourth step, of a warm-up of ten, the penalties have three tenths of their strength."""
    model, optimizer, before, gradients = one_step(
        {"precondition": "none", "regularizer_warmup_steps": 10, **BOTH}
    )
    extra = expected(optimizer, model, before)
    assert_moved_by(model, before, {name: gradients[name] + 0.3 * extra[name] for name in extra})


def test_too_few_samples_penalise_nothing():
    model, _, before, gradients = one_step({"precondition": "none", **BOTH, "kfac_min_samples": 10**6})
    assert_moved_by(model, before, gradients)


def test_coordinates_that_were_given_up_stay_exactly_zero():
    model = tiny.llama(init_lora_weights=False)
    adapting = {"reprojection": "balanced", "reprojection_freq": 2, "reprojection_k": 2}
    optimizer = tiny.grit(model, lambda_kfac=0.1, lambda_reproj=0.1, **adapting)
    tiny.train(model, optimizer, 7)
    assert set(optimizer.ranks().values()) == {2}
    for site in support.sites(optimizer):
        assert not site.a[2:].any()
        assert not site.b[:, 2:].any()
        assert site.a[:2].any()


def test_penalties_shrink_what_they_penalise():
    """Trained with a constant loss, only what lies inside the leading directions is left."""
    model, optimizer, _, _ = one_step(
        {"precondition": "none", "fisher_decay": None, **BOTH, "lambda_kfac": 0.0}
    )
    outside = []
    for _ in range(2):
        total = 0.0
        for curvature in optimizer.curvature:
            for i, site in enumerate(curvature.bucket.sites):
                onto = leading_projector(curvature.factors.activation[i].double(), 2)
                total += float(((torch.eye(4) - onto) @ site.a).square().sum().detach())
        outside.append(total)
        for _ in range(200):
            (tiny.loss_of(model) * 0).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert outside[1] < 0.7 * outside[0]


def test_the_papers_preset_has_the_papers_strengths():
    assert presets.PAPER["lambda_kfac"] == 1e-5
    assert presets.PAPER["lambda_reproj"] == 1e-4


@pytest.mark.parametrize("penalty", ["lambda_kfac", "lambda_reproj"])
def test_a_base_that_ascends_still_descends_the_penalties(penalty):
    weights = {}
    for maximize in (False, True):
        model = tiny.llama(layers=1)
        base = torch.optim.AdamW(tiny.trained(model), lr=1e-2, weight_decay=0.0, maximize=maximize)
        options = {penalty: 10.0, "kfac_min_samples": 8, "reprojection_k": 2}
        optimizer = GritOptimizer(base, model, precondition="inverse", **options)
        for seed in range(8):
            ((-1 if maximize else 1) * tiny.loss_of(model, seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[maximize] = tiny.weights(model)
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, msg=name)
