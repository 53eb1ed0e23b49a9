"""Numbers per site from the eigenvalues of a factor. Pure algebra for the host; no step uses it."""

from __future__ import annotations

from torch import Tensor

from grit_optim import linalg


def condition_number(spectrum: Tensor, rank: Tensor) -> Tensor:
    """``λ_1 / λ_k`` over the k coordinates in use: ``[S, r]`` and ``[S]`` to ``[S]``.

    Infinite where λ_k is zero, NaN where λ_1 is zero. Factors are in fp32, so that values above about 1e7
    mean "singular".

    Args:
        spectrum: eigenvalues, largest first.
        rank: k of each site.
    """
    smallest = spectrum.gather(-1, (rank.long() - 1).clamp_min(0)[:, None])[:, 0]
    return spectrum[:, 0] / smallest


def decompose(factor: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[S, r]``, largest first, and eigenvectors ``[S, r, r]`` (columns) of factors, in float64.

    Args:
        factor: ``[S, r, r]``.
        rank: the leading coordinates in use ``[S]``; the others count as zero.
    """
    mask = linalg.leading_mask(rank, factor.shape[-1])
    return linalg.leading_eigenbasis(factor.double(), mask)


def scalars(spectrum: Tensor, rank: Tensor) -> dict[str, Tensor]:
    """``trace``, ``top`` (the largest eigenvalue), ``condition`` and ``effective_rank``, ``[S]`` each."""
    return {
        "trace": spectrum.sum(-1),
        "top": spectrum[:, 0],
        "condition": condition_number(spectrum, rank),
        "effective_rank": linalg.effective_rank(spectrum),
    }
