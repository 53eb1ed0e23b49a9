"""The matrices of the Fisher approximations against their definitions, on random tokens."""

import pytest
import torch

from benchmarks.fisher_distance import dense as fisher_dense
from benchmarks.fisher_distance import report

R, D, TOKENS = 3, 5, 60


def tokens():
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(TOKENS, R, generator=generator, dtype=torch.float64)
    outer = torch.randn(TOKENS, D, generator=generator, dtype=torch.float64) * (inner[:, :1].abs() + 0.1)
    return inner, outer


def dense(inner, outer):
    flat = torch.einsum("ti,tj->tij", inner, outer).flatten(1)
    return flat.T @ flat / len(flat)


def test_each_matrix_is_what_it_is_said_to_be():
    inner, outer = tokens()
    truth = dense(inner, outer)
    made = fisher_dense.approximations(inner, outer, inner.flip(0))
    assert set(made) == set(report.LABELS) == set(report.STATE)
    assert torch.allclose(made["diagonal"], torch.diag(truth.diagonal()))
    traced = torch.einsum("iaja->ij", truth.reshape(R, D, R, D))
    assert torch.allclose(made["block_diagonal"], torch.kron(traced, torch.eye(D).double()))
    assert torch.allclose(made["kfac"], torch.kron(inner.T @ inner / TOKENS, torch.eye(D).double()))
    basis = torch.kron(torch.linalg.eigh(inner.T @ inner)[1].contiguous(), torch.eye(D).double())
    assert torch.allclose(
        basis.T @ made["ekfac"] @ basis, torch.diag((basis.T @ truth @ basis).diagonal()), atol=1e-12
    )


def test_both_sides_of_kfac_are_exact_where_they_are_independent():
    inner, outer = (side[:6] for side in tokens())
    inner, outer = inner.repeat_interleave(6, 0), outer.repeat(6, 1)
    assert torch.allclose(fisher_dense.approximations(inner, outer, inner)["kfac-full"], dense(inner, outer))


def test_the_dense_matrix_itself_is_at_no_distance():
    inner, outer = tokens()
    truth, gradient = dense(inner, outer), torch.einsum("ti,tj->ij", inner, outer).flatten()
    exact = fisher_dense.natural(truth, gradient)
    told = fisher_dense.compare(3 * truth, truth, gradient, exact)
    assert told["distance"] == pytest.approx(0, abs=1e-7)
    assert told["cosine"] == pytest.approx(1)
