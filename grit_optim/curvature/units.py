"""The units of a step's statistics, chosen so that batch size, token count and loss scale fall out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.capture.sums import Sums


def loss_tokens(steps: Sequence[Sums], by_gradients: Sequence[Tensor]) -> Tensor:
    """How many tokens a step's loss is a mean over, as far as the taps can tell.

    It is the least number of tokens with δ ≠ 0 over all sites that saw any. In a transformer whose last block
    is adapted that is exact: behind its attention only tokens that are scored have a gradient. In other
    models it is too large, and it is too small where experts share the tokens out. The error is a common
    factor of all predicted losses, and does not change their order.

    Args:
        steps: the step's sums, one entry per bucket.
        by_gradients: for each bucket, the sites whose sums are of no tokens, boolean ``[S]``.

    Returns:
        A scalar on the first bucket's device; 1 where no tap saw any token.
    """
    device = steps[0].rows.device
    fewest = [
        torch.where((s.tokens > 0) & ~others, s.tokens, torch.inf).amin().to(device)
        for s, others in zip(steps, by_gradients, strict=True)
    ]
    least = torch.stack(fewest).amin()
    return torch.where(least.isfinite(), least, torch.ones_like(least))


def gradient_unit(steps: Sequence[Sums], ranks: Sequence[Tensor] | None = None) -> Tensor:
    """The mean of this step's ``tr(Σ_g)/r`` over all sites that saw tokens.

    All δ carry the factor 1/N of a loss that is a mean over N tokens, and the loss scale of fp16. Both are
    common to all sites. One common unit takes them out and keeps the sites' relative sizes.

    Args:
        steps: the step's sums, one entry per bucket.
        ranks: number of coordinates in use of each bucket's sites ``[S]``, in the place of r; None: all.

    Returns:
        A positive scalar on the first bucket's device; 1 where the mean is zero or not finite.
    """
    device = steps[0].rows.device
    in_use = ranks if ranks is not None else [None] * len(steps)
    means = [linalg.mean_eigenvalue(s.gradient, rank) for s, rank in zip(steps, in_use, strict=True)]
    totals = [(mean / s.rows.clamp_min(1)).sum().to(device) for mean, s in zip(means, steps, strict=True)]
    seen = [(s.rows > 0).sum().to(device) for s in steps]
    unit = reduce(torch.add, totals) / reduce(torch.add, seen).clamp_min(1)
    return torch.where(torch.isfinite(unit) & (unit > 0), unit, torch.ones_like(unit))
