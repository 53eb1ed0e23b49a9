"""The batched algebra against dense float64 truth, one site at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_optim import linalg

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 7))


def factors(sites, rank, seed=0, condition=1e3, dtype=torch.float64):
    """Random positive definite matrices whose eigenvalues span ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(sites, rank, rank, generator=generator, dtype=torch.float64))[0]
    values = condition ** torch.rand(sites, rank, generator=generator, dtype=torch.float64)
    return (basis * values[:, None, :] @ basis.mT).to(dtype)


def everything(sites, rank):
    return torch.ones(sites, rank, dtype=torch.bool)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 1000))
def test_damped_inverse_is_the_dense_inverse(size, seed):
    factor = factors(*size, seed=seed)
    strength = linalg.damping_strength(factor, 0.1, relative=True)
    inverse, used = linalg.damped_inverse(factor, strength)
    for site in range(size[0]):
        truth = torch.linalg.inv(
            factor[site] + 0.1 * factor[site].trace() / size[1] * torch.eye(size[1]).double()
        )
        torch.testing.assert_close(inverse[site], truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(used, strength)


def test_relative_damping_scales_with_the_factor_and_absolute_does_not():
    factor = factors(2, 3)
    relative = [linalg.damping_strength(c * factor, 0.1, relative=True) for c in (1.0, 1e-6)]
    torch.testing.assert_close(relative[1], 1e-6 * relative[0])
    assert linalg.damping_strength(1e-6 * factor, 0.1, relative=False).tolist() == [0.1, 0.1]


def test_damping_escalates_only_where_a_matrix_is_indefinite():
    factor = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -0.05]))])
    inverse, used = linalg.damped_inverse(factor, torch.full((2,), 1e-3))
    assert used.tolist() == pytest.approx([1e-3, 1e-1])
    torch.testing.assert_close(inverse[1].diagonal(), torch.tensor([1 / 1.1, 1 / 1.1, 1 / 0.05]))
    torch.testing.assert_close(inverse[0], torch.eye(3) / 1.001)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf], ids=["zero", "nan", "inf"])
def test_a_hopeless_matrix_gets_the_identity_and_leaves_its_neighbours_alone(bad):
    factor = factors(2, 3, dtype=torch.float32)
    factor[1] = bad
    inverse, used = linalg.damped_inverse(factor, linalg.damping_strength(factor, 0.1, relative=True))
    torch.testing.assert_close(inverse[1], torch.eye(3))
    assert used[1].isnan()
    truth = torch.linalg.inv(factor[0].double() + used[0].double() * torch.eye(3))
    torch.testing.assert_close(inverse[0].double(), truth, rtol=1e-4, atol=1e-6)


def test_eigenvalues_come_largest_first_and_rebuild_the_factor():
    factor = factors(3, 5)
    values, vectors = linalg.descending_eigh(factor)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(vectors * values[:, None, :] @ vectors.mT, factor)


def test_eigenbasis_isolates_given_up_coordinates_exactly():
    mask = linalg.leading_mask(torch.tensor([2, 5, 3]), 5)
    factor = factors(3, 5) * mask[:, None, :] * mask[:, :, None]
    factor[2, :3, :3] = torch.outer(
        torch.ones(3), torch.ones(3)
    ).double()  # rank-deficient where it is in use, too
    values, vectors = linalg.leading_eigenbasis(factor, mask)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    torch.testing.assert_close(vectors * values[:, None, :] @ vectors.mT, factor)
    assert torch.equal(vectors[0, 2:, 2:], torch.eye(3, dtype=torch.float64))
    assert torch.count_nonzero(vectors[0, 2:, :2]) == 0 == torch.count_nonzero(vectors[0, :2, 2:])


def test_projector_keeps_the_leading_eigenvectors_of_each_site():
    factor = factors(2, 4)
    _, vectors = linalg.descending_eigh(factor)
    projector = linalg.projector(vectors, linalg.leading_mask(torch.tensor([1, 3]), 4))
    for site, rank in enumerate((1, 3)):
        top = torch.linalg.eigh(factor[site])[1][:, -rank:]
        torch.testing.assert_close(projector[site], top @ top.T)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 1000))
def test_balance_makes_both_factors_diagonal_and_proportional(size, seed):
    activation, gradient = factors(*size, seed=seed), factors(*size, seed=seed + 1)
    transform, inverse, spectrum = linalg.balance(activation, gradient, everything(*size))
    torch.testing.assert_close(
        transform @ inverse, torch.eye(size[1], dtype=torch.float64).expand(size[0], -1, -1)
    )
    balanced_a = transform @ activation @ transform.mT
    balanced_g = inverse.mT @ gradient @ inverse
    for site in range(size[0]):
        unit = (balanced_a[site].trace() / spectrum[site].sum()).item()
        scale = spectrum[site].max().item()
        torch.testing.assert_close(balanced_a[site] / unit, spectrum[site].diag(), rtol=0, atol=1e-8 * scale)
        torch.testing.assert_close(balanced_g[site] * unit, spectrum[site].diag(), rtol=0, atol=1e-8 * scale)
    assert (spectrum.diff() <= 1e-9).all()
    torch.testing.assert_close(torch.linalg.det(transform).abs(), torch.ones(size[0], dtype=torch.float64))


def test_balanced_spectrum_is_that_of_the_product_of_the_factors():
    """Λ² are the eigenvalues of Σ_a Σ_g, whatever the coordinates."""
    activation, gradient = factors(1, 5, seed=3), factors(1, 5, seed=4)
    _, _, spectrum = linalg.balance(activation, gradient, everything(1, 5))
    truth = torch.linalg.eigvals(activation[0] @ gradient[0]).real.sort(descending=True)[0]
    torch.testing.assert_close(spectrum[0].square(), truth)


def test_balance_is_block_exact_where_coordinates_were_given_up():
    mask = linalg.leading_mask(torch.tensor([3]), 5)
    inside = mask[:, None, :] & mask[:, :, None]
    activation, gradient = factors(1, 5) * inside, factors(1, 5, seed=9) * inside
    transform, inverse, spectrum = linalg.balance(activation, gradient, mask)
    small = linalg.balance(activation[:, :3, :3], gradient[:, :3, :3], everything(1, 3))
    torch.testing.assert_close(transform[:, :3, :3].abs(), small[0].abs())
    torch.testing.assert_close(spectrum[:, :3], small[2])
    for matrix in (transform, inverse):
        assert torch.equal(matrix[0, 3:, 3:], torch.eye(2, dtype=torch.float64))
        assert torch.count_nonzero(matrix[0, 3:, :3]) == 0 == torch.count_nonzero(matrix[0, :3, 3:])
    assert spectrum[0, 3:].tolist() == [0, 0]


def test_dropping_trailing_balanced_coordinates_is_the_cheapest_projection():
    """No other rank-k projection of h costs less in the K-FAC metric, and the cost is Σ dropped Λ²."""
    activation, gradient = factors(1, 4, seed=5)[0], factors(1, 4, seed=6)[0]
    transform, inverse, spectrum = (
        m[0] for m in linalg.balance(activation[None], gradient[None], everything(1, 4))
    )
    keep = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))

    def cost(projection):
        rest = torch.eye(4, dtype=torch.float64) - projection
        return torch.trace(rest.T @ gradient @ rest @ activation).item()

    ours = cost(inverse @ keep @ transform)
    assert ours == pytest.approx(spectrum[2:].square().sum().item(), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        left, right = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
        assert cost(left @ right.T) >= ours


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
def test_damped_power_is_the_power_of_the_damped_matrix(power):
    matrix = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor, strength = matrix @ matrix.mT, torch.tensor([0.1, 1.0, 1e-3], dtype=torch.float64)
    found, used = linalg.damped_power(factor, strength, power)
    values, vectors = torch.linalg.eigh(linalg.damped(factor, strength))
    torch.testing.assert_close(found, vectors @ torch.diag_embed(values**-power) @ vectors.mT)
    torch.testing.assert_close(used, strength)


def test_damped_power_of_nothing_is_the_identity():
    hopeless = torch.stack([torch.zeros(3, 3), torch.full((3, 3), torch.nan), torch.eye(3)])
    found, used = linalg.damped_power(hopeless, linalg.damping_strength(hopeless, 0.3, relative=True), 0.5)
    torch.testing.assert_close(found[:2], torch.eye(3).expand(2, 3, 3), rtol=0, atol=0)
    assert used.isnan().tolist() == [True, True, False]
    torch.testing.assert_close(found[2], torch.eye(3) / 1.3**0.5)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 1000), st.sampled_from([2, 4]), st.sampled_from([1e-3, 0.01, 0.3]))
def test_roots_by_products_are_those_by_eigendecomposition(size, seed, order, damping):
    factor = factors(*size, seed=seed, condition=1e6, dtype=torch.float32) * 1e-9
    strength = linalg.damping_strength(factor, damping, relative=True)
    truth, used = linalg.damped_root(factor.double(), strength.double(), order, damping)
    assert torch.equal(used, strength.double())
    found = linalg.newton_root(factor, strength, order, damping).double()
    condition = size[1] * (1 + damping) / damping
    assert (found - truth).norm() <= 2 * condition * torch.finfo(torch.float32).eps * truth.norm()


@pytest.mark.parametrize("bad", [0.0, torch.inf, torch.nan])
def test_roots_of_a_hopeless_matrix_are_the_identity_and_its_neighbours_are_spared(bad):
    factor = factors(3, 4, dtype=torch.float32)

    def roots():
        return linalg.newton_root(factor, linalg.damping_strength(factor, 0.1, relative=True), 2, 0.1)

    alone = roots()
    factor[1] = bad
    found = roots()
    assert torch.equal(found[1], torch.eye(4))
    assert torch.equal(found[[0, 2]], alone[[0, 2]])


def test_a_hopeless_matrix_is_told_on_a_device_as_on_the_cpu():
    _, used = linalg.damped_root(torch.empty(2, 3, 3, device="meta"), torch.empty(2, device="meta"), 2, 0.1)
    assert (used.shape, used.device.type) == ((2,), "meta")


def test_small_damping_and_other_roots_go_by_eigendecomposition_on_any_device(monkeypatch):
    calls = []
    monkeypatch.setattr(linalg, "newton_root", lambda *arguments: calls.append(arguments[2:]))
    factor, strength = torch.empty(2, 3, 3, device="meta"), torch.empty(2, device="meta")
    for order, damping in ((2, 0.1), (4, 0.1), (3, 0.1), (2, 1e-4)):
        linalg.damped_root(factor, strength, order, damping)
    linalg.damped_root(torch.eye(3)[None], torch.tensor([0.1]), 2, 0.1)
    assert calls == [(2, 0.1), (4, 0.1)]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_k_equal_entries_have_effective_rank_k(k):
    spectrum = torch.zeros(2, 6)
    spectrum[0, :k] = 0.7
    assert linalg.effective_rank(spectrum).tolist() == [pytest.approx(k, rel=1e-5), 0]


def test_effective_rank_falls_as_one_entry_comes_to_dominate():
    spectra = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [9.0, 1.0, 1.0], [1e6, 1.0, 1.0]])
    share = spectra / spectra.sum(1, keepdim=True)
    expected = torch.exp(-(share * share.log()).sum(1))
    found = linalg.effective_rank(spectra)
    torch.testing.assert_close(found, expected)
    assert (found.diff() < 0).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    below=st.sampled_from([0.0, 1e-16, 1e-10, 1e-7, 1e-4]),
    which=st.sampled_from(["activation", "gradient", "both"]),
)
def test_balance_is_bounded_where_an_eigenvalue_is_slightly_negative(seed, below, which):
    """Rounding leaves such factors; what lies below it counts as zero."""
    random = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(2, 4, 4, generator=random, dtype=torch.float64))[0]
    values = torch.tensor([1.0, 0.3, 0.01, -below], dtype=torch.float64)
    bad, good = turns @ torch.diag(values) @ turns.mT, turns @ torch.diag(values.abs() + 0.1) @ turns.mT
    activation = bad if which != "gradient" else good
    gradient = bad.flip(0) if which != "activation" else good.flip(0)
    transform, inverse, spectrum = linalg.balance(activation, gradient, everything(2, 4))
    assert (torch.linalg.matrix_norm(transform) * torch.linalg.matrix_norm(inverse) < 1e7).all()
    torch.testing.assert_close(transform @ inverse, torch.eye(4).double().expand(2, 4, 4), rtol=0, atol=1e-8)
    assert (spectrum >= 0).all()


@settings(deadline=None, max_examples=60)
@given(
    kept=st.integers(1, 4),
    spectra=st.tuples(
        *[st.lists(st.sampled_from([1.0, 1e-4, 1e-12, 0.0, -1e-8, -0.3]), min_size=4, max_size=4)] * 2
    ),
    scales=st.tuples(*[st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30])] * 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_balance_is_bounded_and_leaves_given_up_coordinates_whatever_the_factors_are(
    kept, spectra, scales, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    for matrix, spectrum, scale in zip(pair[:, 0], spectra, scales, strict=True):
        basis = torch.linalg.qr(torch.randn(kept, kept, generator=generator, dtype=torch.float64))[0]
        matrix[:kept, :kept] = scale * (basis * torch.tensor(spectrum[:kept], dtype=torch.float64)) @ basis.mT
    activation, gradient = linalg.symmetric(pair).to(dtype)
    mask = torch.arange(4)[None] < kept
    transform, inverse, spectrum = linalg.balance(activation, gradient, mask)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(transform[0] @ inverse[0], identity, rtol=0, atol=1e-3)
    for matrix in (transform[0], inverse[0]):
        assert torch.equal(matrix[kept:], identity[kept:])
        assert torch.equal(matrix[:, kept:], identity[:, kept:])
    assert spectrum.isfinite().all()
    assert (spectrum.diff() <= 0).all()
    assert (spectrum[0, kept:] == 0).all()
