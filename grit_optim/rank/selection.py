"""Which rank each site keeps: decided by its own spectrum, or in competition for a common budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grit_optim import linalg


def rank_for_energy(spectrum: Tensor, threshold: float) -> Tensor:
    """Smallest k whose k leading entries hold the share ``threshold`` of the sum: ``[S, r] -> [S]``.

    Args:
        spectrum: non-negative and descending: eigenvalues of Σ_a, or Λ² of balanced coordinates.
        threshold: τ in (0, 1] (the GRIT paper's symbol).

    Returns:
        k in 1…r, int64; r where the spectrum is zero, since nothing then tells which direction to give up.
    """
    total = spectrum.sum(-1, keepdim=True)
    cumulative = spectrum.cumsum(-1)
    # k counts the entries before the threshold is reached, and the one that reaches it. The slack lets τ = 1
    # drop exact zeros.
    short = cumulative < threshold * total * (1 - 4 * torch.finfo(spectrum.dtype).eps)
    size = spectrum.shape[-1]
    k = (short.sum(-1) + 1).clamp_max(size)
    return torch.where(total[:, 0] > 0, k, torch.full_like(k, size))


def continued(spectrum: Tensor, rank: Tensor) -> Tensor:
    """The spectrum with entries beyond the rank guessed, by a geometric series.

    A coordinate that is not in use has no curvature to measure. The ratio of the last two entries in use
    tells what another direction would be worth: little where the spectrum falls off steeply, much where it is
    still flat at its end.

    Args:
        spectrum: Λ², descending, and zero beyond the rank ``[S, r]``.
        rank: coordinates in use ``[S]``.
    """
    size = spectrum.shape[-1]
    last, before = (spectrum.gather(1, (rank - i).clamp(0, size - 1)[:, None]) for i in (1, 2))
    ratio = torch.where(rank[:, None] >= 2, last / before.clamp_min(torch.finfo(spectrum.dtype).tiny), 0.5)
    beyond = torch.arange(size, dtype=torch.int64, device=rank.device) - rank[:, None] + 1
    guess = torch.where(rank[:, None] > 0, last * ratio.clamp_max(1.0) ** beyond.clamp_min(0), 0.0)
    return torch.where(beyond > 0, guess, spectrum)


@dataclass(frozen=True)
class RankPolicy:
    """How each site's rank is decided by its own spectrum at a reprojection. It never rises.

    Attributes:
        fixed: ``reprojection_k``, used while there is no threshold; None keeps the current rank.
        threshold: τ; None while rank adaptation is off or has not started.
        floor: ``min_lora_rank``. A site that is below it already stays where it is.
    """

    fixed: int | None
    threshold: float | None
    floor: int

    @property
    def reduces(self) -> bool:
        """Whether the policy may reduce a rank."""
        return self.fixed is not None or self.threshold is not None

    def next_rank(self, spectrum: Tensor, current: Tensor, allowed: Tensor) -> Tensor:
        """The rank that each site keeps from now on, ``[S]``.

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


@dataclass(frozen=True)
class Bids:
    """What the sites of one bucket bring to the competition for a common budget.

    Attributes:
        loss: predicted rise of the loss if a direction is dropped ``[S, r]``, descending.
        size: parameters of one direction, d_in + d_out ``[S]``.
        current: rank kept so far ``[S]``.
        allowed: sites whose factors have enough samples ``[S]``. The others keep their rank, whose parameters
            count.
    """

    loss: Tensor
    size: Tensor
    current: Tensor
    allowed: Tensor


def ranks_within(bids: Sequence[Bids], budget: Tensor, floor: int, regrowth: bool = False) -> list[Tensor]:
    """The ranks that hold the most predicted loss within a budget of parameters.

    All directions of all sites are sorted once by predicted loss per parameter, and taken from the top until
    the budget is spent. That is the greedy solution of the knapsack problem, off by less than one direction.
    The budget is exceeded only if what must stay exceeds it: the floor, and sites without samples.

    Args:
        bids: one per bucket.
        budget: parameters of all sites together, a scalar tensor.
        floor: ``min_lora_rank``: leading directions that every site keeps.
        regrowth: whether a site's rank may rise.

    Returns:
        The rank of each site ``[S]``, int64, one tensor per bucket.
    """
    device = bids[0].loss.device
    entries = [_entries(bid, floor, regrowth) for bid in bids]
    priority, size, must = (
        torch.cat([part.flatten().to(device) for part in parts]) for parts in zip(*entries, strict=True)
    )
    order = priority.sort(descending=True, stable=True).indices
    # A scalar on the CPU is compared as a number: copying it to a GPU would wait.
    fits = size[order].cumsum(0) <= (budget if budget.device.type == "cpu" else budget.to(device))
    keep = torch.zeros_like(must).index_put((order,), fits) & (priority >= 0) | must
    parts = keep.split([bid.loss.numel() for bid in bids])
    return [part.view_as(bid.loss).sum(-1).to(bid.loss.device) for part, bid in zip(parts, bids, strict=True)]


def _entries(bid: Bids, floor: int, regrowth: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each direction ``[S, r]``, what the competition needs to know.

    Returns:
        Predicted loss per parameter (−1 where the direction is not to be had), its parameters, and whether it
        must stay.
    """
    width = bid.loss.shape[-1]
    held = linalg.leading_mask(bid.current, width)
    loss = continued(bid.loss, bid.current) if regrowth else bid.loss
    lowest = torch.where(bid.allowed, bid.current.clamp_max(floor), bid.current)
    must = linalg.leading_mask(lowest, width)
    offered = (held | bid.allowed[:, None]) if regrowth else held
    size = bid.size[:, None].expand_as(loss).double()
    priority = torch.where(must, torch.inf, torch.where(offered, loss.double() / size, -1.0))
    return priority, size, must
