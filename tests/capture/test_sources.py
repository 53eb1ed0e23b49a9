"""Sites whose taps are silent take their curvature from their gradients, in every mode; it is said once."""

import copy
import logging
import warnings

import pytest
import support
import torch
from around import go_around_the_tap, layer_of
from tiny import adamw, grit, llama, loss_of, train, trained, weights
from twin import warm

from grit_optim import GritOptimizer

MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]
SAID = "from their gradients"


def all_around(model):
    """The model, with no module of an adapter called in any forward pass."""
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            go_around_the_tap(module)
    return model


def said(caplog):
    return [record.getMessage() for record in caplog.records if SAID in record.getMessage()]


def sources(optimizer):
    return {report.name: report.status for report in optimizer.check_capture()}


# ---------------------------------------------------------------- going over


@pytest.mark.parametrize("mode", MODES)
def test_silent_sites_go_over_after_the_first_steps(caplog, mode):
    model = all_around(llama())
    optimizer = grit(model, precondition=mode, kfac_update_freq=1)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "grit_optim"):
        warnings.simplefilter("error", UserWarning)
        train(model, optimizer, 8)
    told = optimizer.telemetry()
    assert told["sites_by_gradients"] == 14
    assert told["engaged_sites"] == (0 if mode == "none" else 14)
    assert len(said(caplog)) == 1
    assert "14 site(s) (base_model.model.model.layers.0" in said(caplog)[0]
    loss_of(model).backward()
    assert set(sources(optimizer).values()) == {"gradients"}


def test_only_the_silent_site_goes_over():
    model = llama()
    go_around_the_tap(layer_of(model, "layers.0.self_attn.v_proj"))
    optimizer = grit(model)
    train(model, optimizer, 8)
    loss_of(model).backward()
    by = sources(optimizer)
    assert by.pop("base_model.model.model.layers.0.self_attn.v_proj.default") == "gradients"
    assert set(by.values()) == {"ok"}
    assert optimizer.telemetry()["engaged_sites"] == 14


def test_a_site_that_becomes_silent_in_mid_run_goes_over(caplog):
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 12)
    assert optimizer.telemetry()["sites_by_gradients"] == 0
    all_around(model)
    with caplog.at_level(logging.INFO, "grit_optim"):
        train(model, optimizer, 4)
    assert optimizer.telemetry()["sites_by_gradients"] == 14
    assert len(said(caplog)) == 1
    factors = optimizer.curvature[0].factors
    torch.testing.assert_close(  # what the taps saw has another unit, and is forgotten
        factors.activation.diagonal(dim1=1, dim2=2).mean(1), torch.ones(14), rtol=1e-4, atol=1e-4
    )


def test_a_site_that_is_seen_in_part_goes_over(caplog):
    """Half of the uses of its weights go around its tap."""
    model = warm(llama())
    layer = layer_of(model, "layers.0.self_attn.v_proj")
    tapped, a, b = layer.forward, layer.lora_A["default"], layer.lora_B["default"]
    layer.forward = lambda x: tapped(x) + 0.5 * (x @ a.weight.T @ b.weight.T)
    optimizer = grit(model)
    with caplog.at_level(logging.INFO, "grit_optim"):
        train(model, optimizer, 4)
    assert optimizer.telemetry()["sites_by_gradients"] == 1
    assert "which come from more than the calls of `lora_A`" in said(caplog)[0]


def test_one_step_whose_gradients_were_set_by_hand_changes_nothing():
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 6)
    gradients = torch.autograd.grad(loss_of(model, 6), trained(model))
    for p, g in zip(trained(model), gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 3)
    assert optimizer.telemetry()["sites_by_gradients"] == 0


# ---------------------------------------------------------------- by gradients from the start


@pytest.mark.parametrize("mode", MODES)
def test_without_any_hook(mode):
    """No hook stands on the model; fused kernels or not is then of no consequence."""
    runs = []
    for prepared in (llama(), all_around(llama())):
        optimizer = grit(prepared, precondition=mode, kfac_update_freq=1, capture="gradients")
        assert not any(m._forward_hooks for m in prepared.modules())
        assert not any(p._backward_hooks for p in trained(prepared))
        train(prepared, optimizer, 6)
        runs.append(weights(prepared))
        assert optimizer.telemetry()["engaged_sites"] == (0 if mode == "none" else 14)
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=1e-3, atol=1e-5)


def test_the_factors_are_covariances_of_the_gradients():
    model = warm(llama().double())
    optimizer = GritOptimizer(adamw(model), model, capture="gradients", fisher_decay=0.0)
    loss_of(model).backward()
    curvature = optimizer.curvature[0]
    wanted = []
    for site in curvature.bucket.sites:
        a, b = site.a.grad @ site.a.grad.T, site.b.grad.T @ site.b.grad
        wanted.append((a / a.trace(), b / b.trace(), (site.a.detach() @ site.a.grad.T).square().sum()))
    optimizer.step()
    factors = curvature.factors
    sizes = []
    for i, (a, b, size) in enumerate(wanted):
        found_a, found_b = factors.gradient[i].double(), factors.activation[i].double()
        torch.testing.assert_close(found_a / found_a.trace(), a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found_b / found_b.trace(), b, rtol=1e-4, atol=1e-6)
        sizes.append(found_a.trace() * found_b.trace() / size)
    sizes = torch.stack(sizes)
    torch.testing.assert_close(sizes, sizes.mean().expand(14), rtol=1e-4, atol=0.0)


def test_in_expectation_they_are_the_factors_of_independent_tokens():
    """∇A ∇Aᵀ and ∇Bᵀ ∇B of many independent tokens have the shape of Σ_g and Σ_a, and ‖A ∇Aᵀ‖² their size."""
    generator = torch.Generator().manual_seed(0)
    rank, width, tokens, steps = 3, 40, 64, 400
    mix_h, mix_d = torch.randn(2, rank, rank, generator=generator, dtype=torch.float64)
    total_a, total_b, size = torch.zeros(3, rank, rank, dtype=torch.float64)
    for _ in range(steps):
        h, d, x, g = (
            torch.randn(tokens, n, generator=generator, dtype=torch.float64)
            for n in (rank, rank, width, width)
        )
        h, d = h @ mix_h.T, d @ mix_d.T
        total_a, total_b = total_a + (d.T @ x) @ (d.T @ x).T, total_b + (g.T @ h).T @ (g.T @ h)
        size += (h.T @ d).square() / steps
    sigma_g, sigma_a = mix_d @ mix_d.T, mix_h @ mix_h.T
    torch.testing.assert_close(total_a / total_a.trace(), sigma_g / sigma_g.trace(), rtol=0.1, atol=0.02)
    torch.testing.assert_close(total_b / total_b.trace(), sigma_a / sigma_a.trace(), rtol=0.1, atol=0.02)
    assert size.sum().item() == pytest.approx(tokens * (sigma_a.trace() * sigma_g.trace()).item(), rel=0.1)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 2.0**16, 1e12])
def test_a_loss_scale_is_of_no_consequence(scale):
    found = []
    for factor in (1.0, scale):
        model = warm(llama())
        optimizer = grit(model, capture="gradients", lr=0.0)
        for seed in range(3):
            (factor * loss_of(model, seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        factors = optimizer.curvature[0].factors
        found.append((factors.activation, factors.gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_counted_and_changes_no_factor(bad):
    model = llama()
    optimizer = grit(model, capture="gradients")
    train(model, optimizer, 4)
    before = [t.clone() for t in (optimizer.curvature[0].factors.activation, *weights(model).values())]
    loss_of(model).backward()
    trained(model)[3].grad[0, 0] = bad
    optimizer.step()
    assert optimizer.telemetry()["dropped_folds"] == 1
    assert torch.equal(before[0], optimizer.curvature[0].factors.activation)
    assert all(w.isfinite().all() for w in weights(model).values())


def test_a_site_without_gradients_rests():
    """As an expert that sees no token."""
    model = llama()
    optimizer = grit(model, capture="gradients")
    train(model, optimizer, 4)
    layer = layer_of(model, "layers.1.mlp.up_proj")
    before = optimizer.curvature[0].factors.gradient.clone()
    layer.forward = layer.base_layer.forward
    train(model, optimizer, 2, 4)
    moved = (optimizer.curvature[0].factors.gradient != before).flatten(1).any(1)
    names = optimizer.curvature[0].bucket.names()
    assert [n for n, m in zip(names, moved.tolist(), strict=True) if not m] == [
        "base_model.model.model.layers.1.mlp.up_proj.default"
    ]


# ---------------------------------------------------------------- checkpoints and copies


@pytest.mark.parametrize("capture", ["auto", "gradients"])
@pytest.mark.parametrize("saved_at", [1, 2, 5])
def test_resume_is_exact(capture, saved_at):
    """Before, at and after the step in which the sites go over."""
    model = all_around(llama())
    optimizer = grit(model, capture=capture)
    train(model, optimizer, saved_at)
    kept, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 10 - saved_at, saved_at)
    other = all_around(llama())
    other.load_state_dict(kept)
    again = grit(other, capture=capture)
    again.load_state_dict(saved)
    train(other, again, 10 - saved_at, saved_at)
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(other)[name]), name
    assert again.telemetry()["sites_by_gradients"] == 14


def test_a_run_that_goes_back_to_a_checkpoint_has_its_sources():
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    all_around(model)
    train(model, optimizer, 5, 3)
    assert optimizer.telemetry()["sites_by_gradients"] == 14
    optimizer.load_state_dict(saved)
    assert optimizer.telemetry()["sites_by_gradients"] == 0


def test_a_copy_knows_the_sources():
    model = all_around(llama())
    optimizer = grit(model)
    train(model, optimizer, 5)
    duplicate = copy.deepcopy(optimizer)
    assert support.parts(duplicate).capture.by_gradients == support.parts(optimizer).capture.by_gradients
