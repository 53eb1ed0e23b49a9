"""How many directions a site keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def rank_for_energy(spectrum: Tensor, threshold: float) -> Tensor:
    """Smallest k whose k leading entries hold the share ``threshold`` (τ in the paper) of the sum: ``[S, r] -> [S]``.

    Args:
        spectrum: non-negative, in descending order: eigenvalues of Σ_a, or Λ² of balanced coordinates.
        threshold: τ in (0, 1].

    Returns:
        k in 1…r, int64; r where the spectrum is zero, since nothing then says which direction to give up.
    """
    total = spectrum.sum(-1, keepdim=True)
    cumulative = spectrum.cumsum(-1)
    # Entries before the threshold is reached, plus the one that reaches it. The slack lets τ = 1 drop exact zeros.
    short = cumulative < threshold * total * (1 - 4 * torch.finfo(spectrum.dtype).eps)
    size = spectrum.shape[-1]
    k = (short.sum(-1) + 1).clamp_max(size)
    return torch.where(total[:, 0] > 0, k, torch.full_like(k, size))


@dataclass(frozen=True)
class RankPolicy:
    """Which rank a site keeps after a reprojection.

    Attributes:
        fixed: ``reprojection_k``, used while there is no threshold; None keeps the current rank.
        threshold: τ, or None while rank adaptation is off or has not started.
        floor: ``min_lora_rank``; a site that is below it already stays where it is.
    """

    fixed: int | None
    threshold: float | None
    floor: int

    def next_rank(self, spectrum: Tensor, current: Tensor, allowed: Tensor) -> Tensor:
        """The rank each site keeps from now on; it never rises.

        Args:
            spectrum: what τ is measured on, descending ``[S, r]``.
            current: rank kept so far ``[S]``.
            allowed: sites whose factors have enough samples ``[S]``; the others keep their rank.
        """
        if self.threshold is not None:
            wanted = rank_for_energy(spectrum, self.threshold).clamp_min(self.floor)
        elif self.fixed is not None:
            wanted = torch.full_like(current, self.fixed)
        else:
            wanted = current
        return torch.where(allowed, torch.minimum(wanted, current), current)
