"""The units in which a step's statistics are counted, so that batch size, token count and loss scale fall out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.capture.sums import Sums


def loss_tokens(steps: Sequence[Sums]) -> Tensor:
    """How many tokens a step's loss is a mean over, as far as the taps can tell: a scalar on the first bucket's device.

    It is the least number of tokens with δ ≠ 0 over all sites that saw any. In a transformer whose last block
    is adapted that is exact: behind its attention only the tokens that are scored have a gradient. Elsewhere
    it is too large, and too small where experts share the tokens out. That is a common factor of all
    predicted losses; their order does not depend on it.
    """
    device = steps[0].rows.device
    fewest = [torch.where(s.tokens > 0, s.tokens, torch.inf).amin().to(device) for s in steps]
    least = torch.stack(fewest).amin()
    return torch.where(least.isfinite(), least, torch.zeros_like(least))


def gradient_unit(steps: Sequence[Sums], ranks: Sequence[Tensor] | None = None) -> Tensor:
    """Mean over all sites that saw tokens of ``tr(Σ_g)/r`` in this step, a positive scalar on the first bucket's device.

    The loss's δ carry 1/N, N the number of target tokens of the batch, and the loss scale of fp16; both are
    common to all sites, so one common unit takes them out and leaves the sites' relative sizes alone.

    Args:
        steps: the step's sums, one entry per bucket.
        ranks: coordinates in use of each bucket's sites ``[S]``, in the place of r; by default all.
    """
    device = steps[0].rows.device
    in_use = ranks if ranks is not None else [None] * len(steps)
    means = [linalg.mean_eigenvalue(s.gradient, rank) for s, rank in zip(steps, in_use, strict=True)]
    totals = [(mean / s.rows.clamp_min(1)).sum().to(device) for mean, s in zip(means, steps, strict=True)]
    seen = [(s.rows > 0).sum().to(device) for s in steps]
    unit = reduce(torch.add, totals) / reduce(torch.add, seen).clamp_min(1)
    return torch.where(torch.isfinite(unit) & (unit > 0), unit, torch.ones_like(unit))
