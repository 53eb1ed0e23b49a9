"""Batched algebra on stacks of r×r matrices, as pure functions.

Shapes used throughout: ``S`` sites, ``r`` rank. A *factor* is a symmetric positive semi-definite tensor ``[S,
r, r]``. A *mask* is a boolean tensor ``[S, r]`` that is true where a rank coordinate is in use. Nothing here
depends on hooks, modules or optimizers. No function reads a value back from a device, since the host would
have to wait; on the CPU values are looked at where that saves work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

ESCALATIONS = 5
"""How often a failed Cholesky factorisation is tried again, each time with ten times the damping."""


SMALLEST_NEWTON_DAMPING = 1e-3
"""Relative damping below which :func:`damped_root` decomposes: fp32 does not carry the Newton iteration."""

_ROUNDING = torch.finfo(torch.float32).eps
"""Of the factors, which are kept in fp32, relative to their largest eigenvalue."""
_NEWTON_TOLERANCE = 1e-7  # the iteration ends when the smallest eigenvalue is this close to 1


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")


@contextmanager
def full_precision() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Switch the caller's autocast off, which would compute our products in bf16 or fp16.

    Gives a function whose context is the caller's again, for what is not ours to compute. Inference mode is
    off there too: what is made in it could not be written outside it.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode enables gradients
        found = [
            (device, torch.get_autocast_dtype(device))
            for device in _AUTOCAST_DEVICES
            if torch.is_autocast_enabled(device)
        ]
        for device, _ in found:
            stack.enter_context(torch.autocast(device, enabled=False))

        @contextmanager
        def as_before() -> Iterator[None]:
            """Autocast as it was outside."""
            with ExitStack() as inner:
                for device, dtype in found:
                    inner.enter_context(torch.autocast(device, dtype=dtype))
                yield

        yield as_before


def eye_like(factor: Tensor) -> Tensor:
    """Identity matrices of the shape, dtype and device of ``factor`` ``[S, r, r]``."""
    return torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)


def symmetric(matrix: Tensor) -> Tensor:
    """``(M + Mᵀ) / 2`` ``[S, r, r]``: rounding leaves a product of three matrices not quite symmetric."""
    return (matrix + matrix.mT) / 2


def mean_eigenvalue(factor: Tensor, rank: Tensor | None = None) -> Tensor:
    """``tr(M) / r`` for each matrix: ``[S, r, r] -> [S]``.

    Args:
        factor: the matrices.
        rank: number of coordinates in use ``[S]``, in the place of r; M is zero on the others. None: all.
    """
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean if rank is None else mean * (factor.shape[-1] / rank.clamp_min(1).float())


def damping_strength(factor: Tensor, damping: float, relative: bool, rank: Tensor | None = None) -> Tensor:
    """λ for each matrix, ``[S]``: ``damping``, times the mean eigenvalue if ``relative``.

    Args:
        factor: the matrices ``[S, r, r]``.
        damping: λ, or λ in units of the mean eigenvalue.
        relative: whether ``damping`` is in units of the mean eigenvalue.
        rank: number of coordinates in use ``[S]``, over which the mean is taken; None: all.
    """
    scale = mean_eigenvalue(factor, rank)
    return damping * scale if relative else torch.full_like(scale, damping)


def damped(factor: Tensor, strength: Tensor) -> Tensor:
    """``M + λ I``: ``[S, r, r]`` and ``[S]`` to ``[S, r, r]``."""
    return factor + strength[..., None, None] * eye_like(factor)


def damped_inverse(factor: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """``(M + λ I)⁻¹`` by Cholesky factorisation; where it fails, λ is raised tenfold until it does not.

    Args:
        factor: symmetric matrices ``[S, r, r]``.
        strength: λ per matrix ``[S]``.

    Returns:
        The inverses ``[S, r, r]`` and the λ used ``[S]``. Where all :data:`ESCALATIONS` failed too (a zero or
        non-finite matrix) the inverse is the identity and λ is NaN.
    """
    cholesky, info = torch.linalg.cholesky_ex(damped(factor, strength))
    if factor.device.type == "cpu" and not info.any():  # the usual case; on the CPU looking costs nothing
        return torch.cholesky_inverse(cholesky), strength
    # All values of λ are tried in one batch: trying them one by one, the host would wait for each outcome.
    rungs = (
        strength * (10.0 ** torch.arange(ESCALATIONS + 1, device=factor.device, dtype=factor.dtype))[:, None]
    )
    cholesky, info = torch.linalg.cholesky_ex(damped(factor.expand(len(rungs), *factor.shape), rungs))
    succeeded = info == 0
    first = succeeded.int().argmax(0)
    sites = torch.arange(factor.shape[0], dtype=torch.int64, device=factor.device)
    usable = succeeded.any(0)
    chosen = torch.where(usable[:, None, None], cholesky[first, sites], eye_like(factor))
    # On a GPU cholesky_inverse reads its error code back and so waits; a triangular solve has none.
    half = torch.linalg.solve_triangular(chosen, eye_like(chosen), upper=False)
    return half.mT @ half, torch.where(usable, rungs[first, sites], torch.nan)


def damped_power(factor: Tensor, strength: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``(M + λ I)^(−power)`` by eigendecomposition.

    Args:
        factor: symmetric positive semi-definite matrices ``[S, r, r]``.
        strength: λ per matrix ``[S]``.
        power: 1 for the inverse, 0.5 for the inverse square root.

    Returns:
        The powers ``[S, r, r]`` and the λ used ``[S]``. Where M + λ I has no positive eigenvalue (a zero or
        non-finite matrix) the power is the identity and λ is NaN.
    """
    values, vectors = descending_eigh(factor)
    values = values.clamp_min(0) + strength[:, None]
    largest = values[:, :1]
    usable = (largest > 0) & largest.isfinite()
    # Where λ is tiny, rounding may leave an eigenvalue at zero: take the largest one's rounding error for it.
    floor = largest * torch.finfo(values.dtype).eps
    scaled = torch.where(usable, torch.maximum(values, floor), 1.0).pow(-power)
    result = (vectors * scaled[:, None, :]) @ vectors.mT
    return torch.where(usable[:, :, None], result, eye_like(result)), torch.where(
        usable[:, 0], strength, torch.nan
    )


def damped_root(factor: Tensor, strength: Tensor, order: int, damping: float) -> tuple[Tensor, Tensor]:
    """``(M + λ I)^(−1/order)``.

    On the CPU by eigendecomposition. On other devices by matrix products alone where the damping bounds the
    condition number, since an eigendecomposition makes the host wait for the device.

    Args:
        factor: symmetric positive semi-definite matrices ``[S, r, r]``.
        strength: λ per matrix ``[S]``.
        order: 2 for the inverse square root, 4 for the inverse fourth root; any other goes by
            eigendecomposition.
        damping: a lower bound of λ in units of tr(M)/r.

    Returns:
        The roots ``[S, r, r]`` and the λ used ``[S]``, as from :func:`damped_power`.
    """
    if factor.device.type == "cpu" or order not in (2, 4) or damping < SMALLEST_NEWTON_DAMPING:
        return damped_power(factor, strength, 1 / order)
    hopeless = ~((strength > 0) & strength.isfinite())
    return newton_root(factor, strength, order, damping), strength.masked_fill(hopeless, torch.nan)


def newton_root(factor: Tensor, strength: Tensor, order: int, damping: float) -> Tensor:
    """``(M + λ I)^(−1/order)`` by the coupled Newton-Schulz iteration (Higham 2008, eq. 6.35).

    Args:
        factor: symmetric positive semi-definite matrices ``[S, r, r]``.
        strength: λ per matrix ``[S]``.
        order: 2 or 4.
        damping: a lower bound of λ in units of tr(M)/r. Below :data:`SMALLEST_NEWTON_DAMPING` fp32 does not
            carry the iteration.

    Returns:
        The roots ``[S, r, r]``; the identity where M is zero or not finite.
    """
    matrix = damped(factor, strength)
    size = torch.linalg.matrix_norm(matrix, keepdim=True)
    usable = (size > 0) & size.isfinite()
    matrix = torch.where(usable, matrix / size, eye_like(matrix))
    # A lower bound of the smallest eigenvalue: λ over the trace of M + λ I, which is no less than the norm.
    smallest = damping / (factor.shape[-1] * (1 + damping))
    root, result = _newton_schulz(matrix, smallest)
    if order == 4:
        _, result = _newton_schulz(root, smallest**0.5)
    return torch.where(usable, result * torch.where(usable, size, 1.0).pow(-1 / order), eye_like(result))


def _newton_schulz(matrix: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """``M^(1/2)`` and ``M^(−1/2)`` of matrices whose eigenvalues lie in [``smallest``, 1]."""
    root, inverse, identity = matrix, eye_like(matrix), eye_like(matrix)
    while 1 - smallest > _NEWTON_TOLERANCE:
        correction = 1.5 * identity - 0.5 * (inverse @ root)
        root, inverse = root @ correction, correction @ inverse
        smallest *= (3 - smallest) ** 2 / 4  # follows the iteration on the host, so nothing is read back
    return root, inverse


def damped_elementwise_power(values: Tensor, strength: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``(s + λ)^(−power)`` entry by entry, for matrices of second moments of any shape.

    Args:
        values: s ≥ 0 ``[S, rows, columns]``.
        strength: λ per matrix ``[S]``.
        power: 1 for the inverse, 0.5 for the inverse square root.

    Returns:
        The powers ``[S, rows, columns]`` and the λ used ``[S]``. Where a matrix is zero throughout, or not
        finite, its powers are ones and its λ is NaN.
    """
    damped_values = values + strength[:, None, None]
    largest = damped_values.amax((1, 2))
    usable = (largest > 0) & largest.isfinite()
    floor = (largest * torch.finfo(values.dtype).eps)[:, None, None]
    result = torch.maximum(damped_values, floor).pow(-power)
    return torch.where(usable[:, None, None], result, 1.0), torch.where(usable, strength, torch.nan)


def descending_eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[S, r]`` and eigenvectors ``[S, r, r]`` (columns), the largest eigenvalue first.

    A matrix that holds a non-finite value counts as zero. On the CPU ``eigh`` would return numbers for it
    without complaint.
    """
    finite = torch.isfinite(factor).all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], factor, torch.zeros_like(factor)))
    return values.flip(-1), vectors.flip(-1)


def block(matrix: Tensor, mask: Tensor) -> Tensor:
    """``matrix`` ``[S, r, r]`` on the coordinates in ``mask`` ``[S, r]``, exactly the identity elsewhere."""
    inside = mask[:, :, None] & mask[:, None, :]
    return torch.where(
        inside, matrix, torch.where(mask[:, :, None], torch.zeros_like(matrix), eye_like(matrix))
    )


def leading_eigenbasis(factor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a factor that is zero outside the leading block ``mask``.

    Args:
        factor: the matrices ``[S, r, r]``.
        mask: the coordinates in use ``[S, r]``, a leading block.

    Returns:
        Eigenvalues ``[S, r]``, largest first and zero outside the mask, and orthogonal matrices ``[S, r,
        r]``. These are exactly the identity outside the mask, so given-up coordinates stay exactly zero under
        them.
    """
    # A given-up coordinate has eigenvalue 0. So may a coordinate in use: −1 tells the two apart.
    isolated = torch.where(mask[:, None, :] & mask[:, :, None], factor, -eye_like(factor) * ~mask[:, None, :])
    values, vectors = descending_eigh(isolated)
    return values.clamp_min(0) * mask, block(vectors, mask)


def projector(vectors: Tensor, keep: Tensor) -> Tensor:
    """``V_k V_kᵀ`` ``[S, r, r]`` of the columns of ``vectors`` ``[S, r, r]`` in ``keep`` ``[S, r]``."""
    leading = vectors * keep[:, None, :]
    return leading @ leading.mT


def leading_mask(rank: Tensor, size: int) -> Tensor:
    """True on the first ``rank[s]`` of ``size`` coordinates: ``[S] -> [S, size]``."""
    return torch.arange(size, dtype=torch.int64, device=rank.device) < rank[:, None]


def balance(activation: Tensor, gradient: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The change of coordinates T that makes both factors diagonal and equal (balanced truncation).

    With ``Σ_a = L Lᵀ`` and ``Lᵀ Σ_g L = U Λ² Uᵀ``: ``T = Λ^{1/2} Uᵀ L⁻¹`` gives ``T Σ_a Tᵀ = T⁻ᵀ Σ_g T⁻¹ =
    Λ`` (Moore 1981, here on the K-FAC factors of a LoRA pair). T is then scaled to ``|det T| = 1``, so that
    neither A nor B grows as a whole; after that the two factors are proportional to Λ.

    Args:
        activation: Σ_a, positive semi-definite on the mask up to rounding ``[S, r, r]``.
        gradient: Σ_g, positive semi-definite on the mask up to rounding ``[S, r, r]``.
        mask: the coordinates in use, a leading block ``[S, r]``; T is the identity on the others.

    Returns:
        ``T`` and ``T⁻¹`` ``[S, r, r]``, and Λ ``[S, r]``, largest first and zero outside the mask. All are in
        double precision, since T may be conditioned much worse than the matrices it is applied to.
    """
    activation = block(activation.double(), mask)
    gradient = torch.where(mask[:, :, None] & mask[:, None, :], gradient.double(), 0.0)
    lower = _cholesky(activation)
    squared, rotation = _leading_eigh(lower.mT @ gradient @ lower, mask)
    # What lies below rounding, negative eigenvalues too, is zero. It counts as the rounding, to bound T.
    floor = squared[:, :1].clamp_min(torch.finfo(squared.dtype).tiny / _ROUNDING**2) * _ROUNDING**2
    spectrum = torch.where(mask, torch.maximum(squared, floor).sqrt(), 1.0)
    log_det = (0.5 * spectrum.log() - lower.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    unit = torch.where(mask, (-log_det / mask.sum(-1).clamp_min(1))[:, None].exp(), 1.0)  # makes |det T| = 1
    scale = unit * spectrum.sqrt()
    transform = scale[:, :, None] * torch.linalg.solve_triangular(lower.mT, rotation, upper=True).mT
    inverse = (lower @ rotation) / scale[:, None, :]
    return block(transform, mask), block(inverse, mask), spectrum * mask


def _leading_eigh(matrix: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a matrix that is zero outside the mask; there these are the identity.

    The coordinates outside come last, whatever the eigenvalues inside are.
    """
    matrix = torch.where(torch.isfinite(matrix).all(-1).all(-1)[:, None, None], matrix, 0.0)
    # Below every eigenvalue inside: rounding leaves some of these at zero or slightly negative.
    size = matrix.abs().amax((1, 2)) * matrix.shape[-1]
    below = -2 * torch.where(size > 0, size, 1.0)[:, None, None]
    values, vectors = descending_eigh(matrix + below * eye_like(matrix) * ~mask[:, None, :])
    return values, block(vectors, mask)


def _cholesky(matrix: Tensor) -> Tensor:
    """L of ``M = L Lᵀ`` ``[S, r, r]``. Where M is not positive definite, small eigenvalues count as rounding.

    The identity where M has no positive eigenvalue, or is not finite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if matrix.device.type == "cpu" and not info.any():  # the usual case; on the CPU looking costs nothing
        return lower
    values, vectors = descending_eigh(matrix)
    raised = torch.maximum(values, values[:, :1] * _ROUNDING)
    repaired, failed = torch.linalg.cholesky_ex(symmetric((vectors * raised[:, None, :]) @ vectors.mT))
    lower = torch.where((info == 0)[:, None, None], lower, repaired)
    return torch.where(((info == 0) | (failed == 0))[:, None, None], lower, eye_like(lower))


def effective_rank(spectrum: Tensor) -> Tensor:
    """``exp(−Σ p log p)`` with ``p = x/Σx`` (Roy and Vetterli 2007): ``[S, r] -> [S]``.

    It is k for k equal entries, and falls towards 1 as one entry comes to dominate. It is 0 where all entries
    are zero.

    Args:
        spectrum: eigenvalues or singular values, non-negative.
    """
    total = spectrum.sum(-1)
    share = spectrum / total.clamp_min(torch.finfo(spectrum.dtype).tiny)[:, None]
    return torch.where(total > 0, torch.special.entr(share).sum(-1).exp(), 0.0)
