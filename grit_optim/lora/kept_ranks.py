"""The ranks in force: how many leading directions of each site are in use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.integrity.fields import Fields, counted, tensor
from grit_optim.lora.buckets import Bucket


class KeptRanks:
    """The ranks in force of a bucket's sites.

    Attributes:
        bucket: the sites, in the order of every ``[S, …]`` tensor.
        rank: directions kept ``[S]``, int64.
        first: directions when the optimizer was first built ``[S]``, int64.
        dropped: predicted rise of the loss by everything given up so far ``[S]``, in the loss's unit;
            infinite where it cannot be predicted.
        given_up: whether directions beyond ``rank`` are out of use. The paper's projections leave all rows of
            A in use.
        compensates: whether the directions that stay take longer steps, as under a rank budget.
    """

    def __init__(self, bucket: Bucket, first: Mapping[str, int], given_up: bool, compensates: bool) -> None:
        self.bucket = bucket
        self.rank = torch.full((len(bucket.sites),), bucket.rank, dtype=torch.int64, device=bucket.device)
        self.dropped = torch.zeros(len(bucket.sites), dtype=torch.float32, device=bucket.device)
        self.given_up = given_up
        self.compensates = compensates
        self.started_from(first)

    @property
    def mask(self) -> Tensor:
        """Coordinates in use, boolean ``[S, r]``."""
        rank = self.rank if self.given_up else torch.full_like(self.rank, self.bucket.rank)
        return linalg.leading_mask(rank, self.bucket.rank)

    @property
    def in_use(self) -> Tensor:
        """Number of coordinates in use ``[S]``."""
        return self.mask.sum(-1)

    @property
    def step_rank(self) -> Tensor:
        """A step's squared length is proportional to it, ``[S]``: the rank; with a budget ``first²/rank``.

        In each step a direction moves by an amount that does not depend on the rank, so an adapter that gives
        directions up learns less per step. Under a budget the directions that stay move ``first / rank``
        times as far. The step's singular values, which are all alike in "spectral", then add up to what they
        did at first.
        """
        if not self.compensates:
            return self.rank.float()
        return self.first.square().float() / self.rank.clamp_min(1).float()

    def started_from(self, first: Mapping[str, int]) -> None:
        """Note the directions that each site had when the optimizer was first built, by site name."""
        ranks = [first[name] for name in self.bucket.names()]
        self.first = torch.tensor(ranks, dtype=torch.int64, device=self.bucket.device)

    def keep(self, rank: Tensor, cost: Tensor | None = None) -> None:
        """Keep ``rank`` directions ``[S]``; ``cost`` ``[S]`` is the rise of the loss that was predicted."""
        self.rank = rank
        if cost is not None:
            self.dropped = self.dropped + cost

    def keep_all(self) -> None:
        """Keep all directions."""
        self.keep(torch.full_like(self.rank, self.bucket.rank))

    def settle(self, used: Tensor) -> Tensor:
        """Take the directions that the weights use ``[S]`` for the ranks.

        Returns:
            The sites that use more than they kept, boolean ``[S]``. Where such a site uses all, nothing
            counts as dropped any more.
        """
        regained = used > self.rank
        self.dropped = torch.where(regained & (used == self.bucket.rank), 0.0, self.dropped)
        self.rank = used
        return regained

    def by_name(self) -> dict[str, int]:
        """Directions kept, by site name. Waits for the device."""
        return dict(zip(self.bucket.names(), self.rank.tolist(), strict=True))

    def dropped_by_name(self) -> dict[str, float]:
        """Predicted rise of the loss by what was given up, by site name. Waits for the device."""
        return dict(zip(self.bucket.names(), self.dropped.tolist(), strict=True))

    @staticmethod
    def saved_fields(rank: int) -> Fields:
        """What a checkpoint may hold of a site of this rank, under the names of :meth:`pack`."""
        return {"rank": counted(0, rank), "dropped": tensor(low=0, finite=False)}

    def pack(self, position: int) -> dict[str, Tensor]:
        """One site's state for a checkpoint."""
        return {"rank": self.rank[position].clone(), "dropped": self.dropped[position].clone()}

    def unpack(self, position: int, state: Mapping[str, Tensor]) -> None:
        """Put one site's state back. Checkpoints from before costs were predicted have no ``dropped``."""
        self.rank[position].copy_(state["rank"])
        if "dropped" in state:
            self.dropped[position].copy_(state["dropped"])
