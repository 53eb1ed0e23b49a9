"""How far each Fisher approximation is from the dense per-token one.

For A and B of a site, F = E[vec(∇) vec(∇)ᵀ] over tokens is built as a dense matrix in float64. It is compared
with the matrix of each approximation, whose side of width d is isotropic where the approximation says nothing
about it:

- distance: ‖F − c F̂‖ / ‖F‖ at the best c, since a common factor is the learning rate's business;
- cosine: between (F̂ + λ)⁻¹ ∇ and (F + λ)⁻¹ ∇ for the gradient ∇ of the whole batch, λ relative to the mean
  eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from grit_optim import Site

DAMPING = 0.3  # what the default, "spectral", uses


def per_token(site: Site, run: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Both sides of every token's gradients, float64: δ ``[T, r]`` and x ``[T, d_in]`` for A, h and g for B.

    Args:
        site: the pair.
        run: one forward and backward pass; gradients are left alone.
    """
    seen: list[Tensor] = []

    def watch(module: Any, args: Any, output: Tensor) -> None:
        """Keep input, output and the output's gradient."""
        x, h = args[0].detach(), output.detach()
        output.register_hook(lambda delta: seen.extend((x, h, delta.detach())))

    def watch_output(module: Any, args: Any, output: Tensor) -> None:
        """Keep the gradient behind B."""
        output.register_hook(lambda g: seen.append(g.detach()))

    hooks = [
        site.tap.register_forward_hook(watch),
        site.b_modules[site.adapter].register_forward_hook(watch_output),
    ]
    run()
    for hook in hooks:
        hook.remove()
    g, x, h, delta = (t.flatten(0, -2).double() for t in seen)
    matters = (delta != 0).any(-1)
    g, x, h, delta = (t[matters] for t in (g, x, h, delta))
    return torch.cat((delta, x), 1), torch.cat((h, g), 1)


def approximations(inner: Tensor, outer: Tensor, opposite: Tensor) -> dict[str, Tensor]:
    """Each approximation's dense matrix ``[r d, r d]`` for one matrix of a pair, the rank side first.

    Args:
        inner: the rank side of every token's gradient ``[T, r]`` (δ for A, h for B).
        outer: its other side ``[T, d]`` (x for A, g for B).
        opposite: the rank side of the pair's other matrix ``[T, r]``.
    """
    count, d = outer.shape
    eye = torch.eye(d, dtype=inner.dtype)
    factor, wide = inner.T @ inner / count, outer.T @ outer / count
    second = inner.square().T @ outer.square() / count
    basis = torch.linalg.eigh(factor)[1].contiguous()
    corrected = (inner @ basis).square().T @ outer.square() / count
    turn = torch.kron(basis, eye)
    weighted = (inner * outer.square().sum(1, keepdim=True)).T @ inner / count  # E[∇A ∇Aᵀ] over single tokens
    return {
        "none": torch.eye(factor.shape[0] * d, dtype=inner.dtype),
        "kfac-paper": torch.kron(opposite.T @ opposite / count, eye),
        "kfac": torch.kron(factor, eye),
        "block_diagonal": torch.kron(weighted, eye),
        "diagonal": torch.diag(second.flatten()),
        "ekfac": (turn * corrected.flatten()) @ turn.T,
        "kfac-full": torch.kron(factor, wide),
    }


def natural(matrix: Tensor, gradient: Tensor) -> Tensor:
    """``(F + λ)⁻¹ ∇`` with λ relative to the mean eigenvalue."""
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(damped, gradient)


def compare(approximation: Tensor, dense: Tensor, gradient: Tensor, truth: Tensor) -> dict[str, float]:
    """Distance and cosine as defined at the module's top; ``truth`` is the dense natural gradient."""
    overlap = (approximation * dense).sum() / (approximation.norm() * dense.norm())
    ours = natural(approximation, gradient)
    cosine = ours @ truth / (ours.norm() * truth.norm())
    return {"distance": float((1 - overlap.square()).clamp_min(0).sqrt()), "cosine": float(cosine)}


def measure_site(site: Site, run: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """A row per matrix and approximation."""
    for side, halves in zip("AB", pair := per_token(site, run), strict=True):
        r = site.rank
        inner, outer = halves[:, :r], halves[:, r:]
        opposite = pair["BA".index(side)][:, :r]
        flat = torch.einsum("ti,tj->tij", inner, outer).flatten(1)
        dense, gradient = flat.T @ flat / len(flat), flat.sum(0)
        truth = natural(dense, gradient)
        for name, approximation in approximations(inner, outer, opposite).items():
            numbers = compare(approximation, dense, gradient, truth)
            yield {"site": site.name, "side": side, "tokens": len(flat), "fisher": name, **numbers}
