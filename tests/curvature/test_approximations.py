"""The Fisher approximations against a dense per-token Fisher information, in float64."""

import pytest
import support
import tiny
import torch
from twin import assert_near

from grit_optim import GritOptimizer, Site
from grit_optim.curvature.moments import GradientMoments
from grit_optim.lora.buckets import build_buckets

KINDS = ("diagonal", "block_diagonal", "ekfac")
TOKENS, R, D_IN, D_OUT = 40, 3, 6, 5


class Layer(tiny.HandWritten):
    """One hand-written pair in float64; every token goes through alone, so a step's gradient is a token's."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(D_IN, D_OUT, R)
        self.double()

    def site(self):
        return Site.from_modules("layer", self.down, self.up, self.scaling)


def token_data(correlated=True):
    """Inputs and output gradients per token; x and g depend on each other if ``correlated``."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.2, D_IN)
    g = torch.randn(TOKENS, D_OUT, generator=generator, dtype=torch.float64)
    return x, g * (x[:, :1].abs() + 0.1) if correlated else g


def per_token_gradients(layer, x, g):
    """∇A ``[T, r, d_in]`` and ∇B ``[T, d_out, r]`` of every token by autograd."""
    grads = []
    for xi, gi in zip(x, g, strict=True):
        loss = (layer(xi[None]) * gi).sum()
        grads.append(torch.autograd.grad(loss, (layer.down.weight, layer.up.weight)))
    return tuple(torch.stack(side) for side in zip(*grads, strict=True))


def dense_fisher(per_token):
    """E[vec(∇) vec(∇)ᵀ], row-major vec: ``[T, rows, columns] -> [n, n]``."""
    flat = per_token.flatten(1)
    return flat.T @ flat / len(flat)


def rank_side(side, matrix, other):
    """The dense form of a rank-side matrix: it multiplies A from the left, B from the right."""
    eye = torch.eye(other, dtype=matrix.dtype)
    return torch.kron(matrix, eye) if side == "A" else torch.kron(eye, matrix)


def trained_through(layer, x, g, **options):
    """An optimizer that never moves a weight and has seen every token in a step of its own."""
    base = torch.optim.SGD(layer.parameters(), lr=0.0)
    settings = {"fisher_decay": None, "damping": "absolute", "kfac_min_samples": 1, "max_tokens": None}
    optimizer = GritOptimizer(
        base, layer, sites=[layer.site()], **{"precondition": "inverse", **settings, **options}
    )
    for xi, gi in zip(x, g, strict=True):
        optimizer.zero_grad()
        (layer(xi[None]) * gi).sum().backward()
        optimizer.step()
    return optimizer


def dense_of(kind, optimizer, side):
    """The dense matrix that an approximation stands for, with the other side isotropic."""
    curvature, other = optimizer.curvature[0], D_IN if side == "A" else D_OUT
    if kind == "kfac":
        a_factor, b_factor = curvature.paired_factors()
        return rank_side(side, (a_factor if side == "A" else b_factor)[0].double(), other)
    mean = curvature.moments.means[side][0].double()
    if kind == "block_diagonal":
        return rank_side(side, mean, other) / other  # ∇A ∇Aᵀ is summed over the other side
    basis = rank_side(side, curvature.operator(side)[0].double(), other)
    return basis @ torch.diag(mean.flatten()) @ basis.T


def fisher_pair(correlated=True):
    layer, (x, g) = Layer(), token_data(correlated)
    return layer, x, g, dict(zip("AB", map(dense_fisher, per_token_gradients(layer, x, g)), strict=True))


@pytest.mark.parametrize("side", ["A", "B"])
def test_the_diagonal_is_the_dense_ones(side):
    layer, x, g, dense = fisher_pair()
    optimizer = trained_through(layer, x, g, fisher="diagonal")
    mean = optimizer.curvature[0].moments.means[side][0]
    torch.testing.assert_close(mean.flatten().double(), dense[side].diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["A", "B"])
def test_the_block_is_the_dense_ones_partial_trace(side):
    layer, x, g, dense = fisher_pair()
    optimizer = trained_through(layer, x, g, fisher="block_diagonal")
    shape, traced = ((R, D_IN), "iaja->ij") if side == "A" else ((D_OUT, R), "aiaj->ij")
    expected = torch.einsum(traced, dense[side].reshape(*shape, *shape))
    torch.testing.assert_close(
        optimizer.curvature[0].moments.matrices(side)[0].double(), expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("side", ["A", "B"])
def test_ekfacs_eigenvalues_are_the_dense_ones_diagonal_in_its_basis(side):
    """Tokens seen twice: the first pass sets the eigenbasis, the second is measured in it."""
    layer, x, g, dense = fisher_pair()
    twice = torch.cat((x, x)), torch.cat((g, g))
    optimizer = trained_through(layer, *twice, fisher="ekfac", kfac_update_freq=TOKENS)
    curvature = optimizer.curvature[0]
    basis = rank_side(side, curvature.operator(side)[0].double(), D_IN if side == "A" else D_OUT)
    assert not torch.allclose(basis, torch.eye(len(basis)).double(), atol=0.1)
    moments = GradientMoments("ekfac", curvature.bucket)
    gradients = per_token_gradients(layer, x, g)["AB".index(side)]
    group = next(group for group in curvature.bucket.groups if group.side == side)
    for gradient in gradients:
        moments.fold(group, curvature.to_eigenbasis(group, gradient[None]), torch.tensor([True]), None)
    expected = (basis.T @ dense[side] @ basis).diagonal()
    # Q itself is fp32.
    torch.testing.assert_close(moments.means[side][0].flatten().double(), expected, rtol=1e-5, atol=1e-7)


def distance(approximation, dense):
    """‖F − c F̂‖ / ‖F‖ at the best c: a common factor is the learning rate's business."""
    cosine = (approximation * dense).sum() / (approximation.norm() * dense.norm())
    return float((1 - cosine.square()).clamp_min(0).sqrt())


@pytest.mark.parametrize("side", ["A", "B"])
def test_ekfac_is_the_nearest_diagonal_in_kfacs_basis(side):
    """So it can only be nearer to the dense Fisher than K-FAC's rank side (George et al. 2018, theorem 2)."""
    layer, x, g, dense = fisher_pair()
    twice = torch.cat((x, x)), torch.cat((g, g))
    options = {"kfac_update_freq": TOKENS}
    by_kind = {
        k: dense_of(k, trained_through(layer, *twice, fisher=k, **options), side) for k in ("kfac", "ekfac")
    }
    assert (by_kind["ekfac"] - dense[side]).norm() < (by_kind["kfac"] - dense[side]).norm()
    assert distance(by_kind["ekfac"], dense[side]) < distance(by_kind["kfac"], dense[side]) < 1


@pytest.mark.parametrize("side", ["A", "B"])
def test_kfac_is_exact_on_its_rank_side_when_both_sides_are_independent(side):
    """Every δ met with every x: the Fisher information then is a Kronecker product."""
    layer, (x, g) = Layer(), token_data()
    x, g = x[:8], g[:7]
    every_x, every_g = x.repeat_interleave(7, 0), g.repeat(8, 1)
    optimizer = trained_through(layer, every_x, every_g, fisher="kfac")
    a_factor, b_factor = (factor[0].double() for factor in optimizer.curvature[0].paired_factors())
    dense = dict(zip("AB", map(dense_fisher, per_token_gradients(layer, every_x, every_g)), strict=True))
    outer_x, outer_g = x.T @ x / 8, 0.25 * g.T @ g / 7  # the pair's scaling is ½
    expected = torch.kron(a_factor, outer_x) if side == "A" else torch.kron(outer_g, b_factor)
    assert_near(expected, dense[side], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["A", "B"])
def test_what_is_applied_is_the_dense_forms_damped_inverse(kind, side):
    layer, x, g, _ = fisher_pair()
    optimizer = trained_through(layer, x, g, fisher=kind, damping="relative", kfac_damping=0.1)
    curvature = optimizer.curvature[0]
    other = D_IN if side == "A" else D_OUT
    dense = dense_of(kind, optimizer, side) * (other if kind == "block_diagonal" else 1)
    dense = dense + 0.1 * dense.diagonal().mean() * torch.eye(len(dense)).double()
    group = next(group for group in curvature.bucket.groups if group.side == side)
    probe = torch.randn(
        1, *group.parameters[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    expected = torch.linalg.solve(dense, probe.flatten()).view_as(probe)
    assert_near(curvature.apply(group, probe), expected, 1e-4, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_decayed_moments_weigh_steps(kind):
    layer = Layer()
    bucket = build_buckets([layer.site()])[0]
    moments, group = GradientMoments(kind, bucket), bucket.groups[0]
    steps = torch.randn(3, 1, R, D_IN, dtype=torch.float64)
    for step in steps:
        moments.fold(group, step, torch.tensor([True]), 0.5)
    kept = moments.means["A"][0].clone()
    moments.fold(group, steps[0] * torch.nan, torch.tensor([False]), 0.5)
    made = [step[0] @ step[0].T if kind == "block_diagonal" else step[0].square() for step in steps]
    expected = (0.25 * made[0] + 0.5 * made[1] + made[2]) / 1.75
    torch.testing.assert_close(moments.means["A"][0].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(moments.means["A"][0], kept), "a step that does not count changes nothing"


# -------------------------------------------------------------------- in training

USES = [(mode, kind) for mode in ("spectral", "steer", "inverse") for kind in KINDS] + [
    ("eigenbasis", "block_diagonal")
]


@pytest.mark.parametrize(("mode", "kind"), USES)
def test_every_use_is_engaged_and_lowers_the_loss(mode, kind):
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition=mode, fisher=kind)
    losses = []
    for _ in range(25):
        losses.append(tiny.loss_of(model, 0))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1].item() < losses[0].item() - 0.15
    told = optimizer.telemetry()
    assert told["engaged_sites"] == 14
    assert mode == "eigenbasis" or told["mean_cosine"] < 0.9999


@pytest.mark.parametrize("kind", KINDS)
def test_relative_moments_do_not_know_the_losss_unit(kind):
    means = []
    for scale in (1.0, 1024.0):
        model = tiny.llama(init_lora_weights=False)
        optimizer = tiny.grit(model, precondition="none", fisher=kind)
        (scale * tiny.loss_of(model)).backward()
        optimizer.step()
        moments = optimizer.curvature[0].moments
        means.append([m for side in ("A", "B") for m in moments.means[side]])
    assert len(means[0]) == 28
    for one, other in zip(*means, strict=True):
        assert float(one.abs().max()) > 0
        assert_near(other, one, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_gradients_leave_the_moments_alone(kind):
    model = tiny.llama(init_lora_weights=False)
    optimizer = tiny.grit(model, fisher=kind)
    tiny.train(model, optimizer, 2)
    before = [m.clone() for side in ("A", "B") for m in optimizer.curvature[0].moments.means[side]]
    tiny.loss_of(model, 2).backward()
    # As clipping may leave it, while the taps saw nothing wrong.
    tiny.trained(model)[5].grad[0, 0] = torch.inf
    optimizer.step()
    after = [m for side in ("A", "B") for m in optimizer.curvature[0].moments.means[side]]
    assert optimizer.telemetry()["dropped_folds"] == 1
    if kind != "ekfac":  # whose moments follow the eigenbasis, which the refresh of that step may turn
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(torch.isfinite(m).all() for m in after)
    assert all(torch.isfinite(p).all() for p in tiny.trained(model))


REFUSED = [
    ({"fisher": "ekfac", "pairing": "paper"}, "leave pairing at 'kfac'"),
    ({"fisher": "diagonal", "precondition": "balanced"}, "which precondition='balanced' changes"),
    ({"fisher": "block_diagonal", "reprojection": "balanced"}, "which reprojection='balanced' changes"),
    ({"fisher": "diagonal", "precondition": "eigenbasis"}, "use precondition='none'"),
    ({"fisher": "ekfac", "precondition": "eigenbasis"}, "Adam's second moments are EK-FAC's eigenvalues"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_combinations_that_mean_nothing_are_refused(options, message):
    model = tiny.llama()
    with pytest.raises(ValueError, match=message):
        tiny.grit(model, **options)


def test_ekfacs_moments_stay_in_their_eigenbasis_when_the_mode_changes():
    """Refreshed in the other mode, they are what they would have been in the old one."""
    refreshed = []
    for mode in ("inverse", "steer"):
        model = tiny.llama()
        optimizer = tiny.grit(model, precondition="inverse", fisher="ekfac", kfac_update_freq=5)
        tiny.train(model, optimizer, 7)
        fresh = tiny.grit(model, precondition=mode, fisher="ekfac", kfac_update_freq=5)
        fresh.load_state_dict(optimizer.state_dict())
        curvature = fresh.curvature[0]
        assert bool(curvature.a_ready.any()) == (mode == "inverse"), "scales of another power are not used"
        support.mode(fresh).refresh(curvature)
        assert curvature.a_ready.all()
        refreshed.append(curvature.moments.means["A"])
    for one, other in zip(*refreshed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("other", ["kfac", "diagonal"])
def test_a_checkpoint_of_another_approximation_starts_its_moments_anew(other):
    """Its factors are of use, its operators are not."""
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition="inverse", fisher="ekfac", kfac_update_freq=5)
    tiny.train(model, optimizer, 7)
    fresh = tiny.grit(model, precondition="inverse", fisher=other, kfac_update_freq=5)
    fresh.load_state_dict(optimizer.state_dict())
    curvature = fresh.curvature[0]
    assert torch.equal(curvature.factors.activation, optimizer.curvature[0].factors.activation)
    assert not curvature.a_ready.any()
    assert torch.equal(curvature.a_operator, torch.eye(4).expand(14, 4, 4))
    if curvature.moments is not None:
        assert not any(m.any() for m in curvature.moments.means["A"])
