"""What the eigenvalues say, against numbers that are known."""

import math

import pytest
import torch

from grit_optim import linalg
from grit_optim.telemetry import spectra


def factor_with(values, seed=0):
    """A symmetric matrix with these eigenvalues, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 1, 1, 1], 4),
        ([5, 5, 0, 0], 2),
        ([7, 0, 0, 0], 1),
        ([0, 0, 0, 0], 0),
        ([0.5, 0.25, 0.125, 0.125], math.exp(1.75 * math.log(2))),
    ],
)
def test_effective_rank(values, expected):
    got = linalg.effective_rank(torch.tensor([values], dtype=torch.float64))
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_effective_rank_does_not_know_the_unit():
    values = torch.tensor([[3.0, 2.0, 0.1]], dtype=torch.float64)
    assert linalg.effective_rank(values).item() == pytest.approx(linalg.effective_rank(1e-9 * values).item())


def test_scalars_of_a_factor_with_known_eigenvalues():
    factors = torch.stack([factor_with([8, 4, 2, 1]), factor_with([3, 3, 3, 3], 1)])
    rank = torch.tensor([4, 4])
    spectrum, vectors = spectra.decompose(factors, rank)
    torch.testing.assert_close(spectrum[0], torch.tensor([8, 4, 2, 1], dtype=torch.float64))
    torch.testing.assert_close(factors @ vectors, vectors * spectrum[:, None, :])
    told = spectra.scalars(spectrum, rank)
    assert told["trace"].tolist() == pytest.approx([15, 12])
    assert told["top"].tolist() == pytest.approx([8, 3])
    assert told["condition"].tolist() == pytest.approx([8, 1])
    assert told["effective_rank"][1].item() == pytest.approx(4)


def test_coordinates_that_were_given_up_do_not_count():
    factor = torch.zeros(1, 4, 4, dtype=torch.float64)
    factor[0, :2, :2] = factor_with([6, 2])
    spectrum, _ = spectra.decompose(factor, torch.tensor([2]))
    assert spectra.condition_number(spectrum, torch.tensor([2])).item() == pytest.approx(3)
    assert spectrum[0, 2:].tolist() == [0, 0]


def test_a_singular_factor_has_an_infinite_condition_number():
    spectrum = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert spectra.condition_number(spectrum, torch.tensor([2, 2]))[0].item() == math.inf
    assert spectra.condition_number(spectrum, torch.tensor([2, 2]))[1].isnan()
