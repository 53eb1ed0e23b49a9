"""The means over steps, against means taken by hand."""

import pytest
import torch

from grit_optim.capture.sums import Sums
from grit_optim.curvature.factors import Factors
from grit_optim.curvature.units import gradient_unit

CPU = torch.device("cpu")
YES = torch.tensor(True)
ONE = torch.ones(())


def step_rows(rows, seed, sites=2, rank=3):
    """Rows of h and δ for each site, and their sums."""
    generator = torch.Generator().manual_seed(seed)
    h, delta = torch.randn(2, sites, rows, rank, generator=generator)
    return h, delta, Sums(h.mT @ h, delta.mT @ delta, torch.full((sites,), float(rows)))


def test_running_mean_is_the_mean_over_all_tokens():
    factors = Factors.zeros(2, 3, CPU)
    steps = [step_rows(rows, seed) for seed, rows in enumerate((4, 7, 1))]
    for _, _, sums in steps:
        factors.fold(sums, YES, None, ONE)
    every_h, every_delta = (torch.cat([s[i] for s in steps], dim=1) for i in (0, 1))
    torch.testing.assert_close(factors.activation, every_h.mT @ every_h / 12)
    torch.testing.assert_close(factors.gradient, every_delta.mT @ every_delta / 12)
    assert factors.activation_samples.tolist() == [12, 12]


def test_decayed_mean_weighs_steps_not_tokens():
    factors = Factors.zeros(2, 3, CPU)
    steps = [step_rows(rows, seed) for seed, rows in enumerate((4, 7, 1))]
    for _, _, sums in steps:
        factors.fold(sums, YES, 0.5, ONE)
    weights = [0.25, 0.5, 1.0]
    truth = sum(w * s[2].activation / n for w, s, n in zip(weights, steps, (4, 7, 1), strict=True)) / sum(
        weights
    )
    torch.testing.assert_close(factors.activation, truth)


@pytest.mark.parametrize("decay", [None, 0.0, 0.9])
def test_a_site_without_tokens_keeps_what_it_has(decay):
    factors = Factors.zeros(2, 3, CPU)
    _, _, sums = step_rows(5, 0)
    factors.fold(sums, YES, decay, ONE)
    before = factors.activation.clone()
    _, _, later = step_rows(5, 1)
    later.rows[1] = 0
    later.activation[1] = later.gradient[1] = 0
    factors.fold(later, YES, decay, ONE)
    assert torch.equal(factors.activation[1], before[1])
    assert factors.activation_samples.tolist() == [10, 5]
    assert not torch.allclose(factors.activation[0], before[0])


def test_a_refused_step_changes_nothing():
    factors = Factors.zeros(2, 3, CPU)
    _, _, sums = step_rows(5, 0)
    factors.fold(sums, YES, 0.9, ONE)
    before = [getattr(factors, name).clone() for name in ("activation", "gradient", "activation_weight")]
    sums.gradient[0, 0, 0] = torch.inf
    assert not sums.is_finite()
    factors.fold(sums, sums.is_finite(), 0.9, ONE)
    after = [getattr(factors, name) for name in ("activation", "gradient", "activation_weight")]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_gradient_unit_takes_out_the_loss_scale_and_keeps_the_sites_apart():
    _, _, small = step_rows(5, 0)
    large = Sums(small.activation, 1e6 * small.gradient, small.rows)
    folded = []
    for sums in (small, large):
        factors = Factors.zeros(2, 3, CPU)
        factors.fold(sums, YES, 0.9, gradient_unit([sums]))
        folded.append(factors.gradient)
    torch.testing.assert_close(folded[0], folded[1])
    traces = folded[0].diagonal(dim1=1, dim2=2).mean(-1)
    assert traces.mean().item() == pytest.approx(1.0, rel=1e-5)
    raw = small.gradient.diagonal(dim1=1, dim2=2).mean(-1)
    assert (traces[0] / traces[1]).item() == pytest.approx((raw[0] / raw[1]).item(), rel=1e-5)


def test_gradient_unit_of_nothing_is_one():
    """In step 0, B is zero and so is every δ."""
    assert gradient_unit([Sums.zeros(2, 3, CPU), Sums.zeros(1, 5, CPU)]).item() == 1


def test_readiness_is_counted_per_factor():
    factors = Factors.zeros(2, 3, CPU)
    factors.activation_samples = torch.tensor([64.0, 63.0])
    factors.gradient_samples = torch.tensor([10.0, 64.0])
    activation, gradient = factors.ready(64)
    assert activation.tolist() == [True, False]
    assert gradient.tolist() == [False, True]
    assert Factors.zeros(1, 2, CPU).ready(0)[0].tolist() == [False], (
        "a factor that has seen nothing is never ready"
    )


def test_change_of_coordinates_follows_h_and_delta():
    """h ← T h and δ ← T⁻ᵀ δ: the factors of the moved tokens are the moved factors."""
    h, delta, sums = step_rows(9, 2)
    factors = Factors.zeros(2, 3, CPU)
    factors.fold(sums, YES, None, ONE)
    transform = torch.randn(2, 3, 3, dtype=torch.float64) + 2 * torch.eye(3)
    inverse = torch.linalg.inv(transform)
    factors.change_coordinates(transform, inverse)
    moved_h, moved_delta = h.double() @ transform.mT, delta.double() @ inverse
    torch.testing.assert_close(factors.activation.double(), moved_h.mT @ moved_h / 9, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        factors.gradient.double(), moved_delta.mT @ moved_delta / 9, rtol=1e-5, atol=1e-5
    )
