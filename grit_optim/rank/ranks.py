"""The ranks of all pairs: what they are, what changes them, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.kept import KeptRanks
from grit_optim.lora.site import Site
from grit_optim.options import RankOptions
from grit_optim.options.declared import PAPER_PROJECTIONS
from grit_optim.profiling import StageTimes
from grit_optim.rank import pairs
from grit_optim.rank.budget import BudgetSchedule, Origin, make_schedule
from grit_optim.rank.coordinates import BALANCING_DAMPING, Coordinates
from grit_optim.rank.report import RankReport, SiteRank, effective_ranks
from grit_optim.rank.selection import Bids, RankPolicy, ranks_within


class Ranks:
    """The ranks in force, how they are reduced in training, and what is known of the ranks given up.

    Attributes:
        kept: the ranks in force, one entry per bucket.
        origin: what each pair was when the optimizer was first built, by name.
        removed: predicted rise of the loss by pairs that were taken out, by name.
        budget: the way of the budget, or None.
        reprojections: times the pairs were reprojected.
    """

    def __init__(self, base: Optimizer, options: RankOptions, times: StageTimes) -> None:
        self.kept: list[KeptRanks] = []
        self.origin: dict[str, Origin] = {}
        self.removed: dict[str, float] = {}
        self.budget: BudgetSchedule | None = None
        self.reprojections = 0
        self._base = base
        self._options = options
        self._times = times
        self._reduced = (
            False  # whether coordinates may have been given up; whether they have, the device knows
        )
        self._versions: list[int] | None = None

    # ---------------------------------------------------------------- which pairs

    def remember(self, sites: Sequence[Site], origin: Mapping[str, Origin]) -> None:
        """Note what the pairs were at first, and size the budget by it; ``origin`` counts for more than the pairs.

        Raises:
            ValueError: a budget that cannot be met.
        """
        self.origin = {**{site.name: Origin(site.rank, site.parameters) for site in sites}, **origin}
        before = self.budget.state() if self.budget is not None else {}
        self.budget = make_schedule(self._options, self.origin.values())
        if self.budget is not None:
            self.budget.load(before)

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Keep all directions of the pairs of these buckets."""
        first = {name: origin.rank for name, origin in self.origin.items()}
        given_up, compensates = self._options.gives_up, self._options.rank_budget is not None
        self.kept = [KeptRanks(bucket, first, given_up, compensates) for bucket in buckets]
        self._versions = None

    # ---------------------------------------------------------------- in a step

    @property
    def follows_loss(self) -> bool:
        """Whether the budget needs the losses."""
        return self._options.rank_budget_schedule == "adaptive"

    def observe(self, loss: Tensor | float | None) -> None:
        """Take note of a step's loss, where the budget follows it."""
        if loss is not None and self.budget is not None and self.follows_loss:
            self.budget.observe(loss)

    def settle_if_loaded(self, curvatures: Sequence[BucketCurvature], versions: list[int]) -> None:
        """Take the ranks from the weights, where somebody has changed those since the last step."""
        if self._versions not in (None, versions):
            pairs.settle_ranks(curvatures)

    def clear_given_up(self, curvatures: Sequence[BucketCurvature]) -> None:
        """Keep what was given up at zero, whatever the base made of it."""
        if self._reduced:
            with self._times("reproject"):
                for curvature in curvatures:
                    pairs.clear_given_up(curvature)

    @property
    def reprojects(self) -> bool:
        """Whether there is a reprojection at all."""
        return self._options.reprojection != "none"

    @property
    def gives_up(self) -> bool:
        """Whether a dropped direction is given up for good."""
        return self._options.gives_up

    def reproject(self, curvatures: Sequence[BucketCurvature], step: int) -> None:
        """Reproject the pairs and adapt their ranks; the base's moments have to be in plain coordinates."""
        self.reprojections += 1
        if not self.gives_up:
            for curvature in curvatures:
                pairs.project(
                    self._base, curvature, self.policy(step), self._options.reprojection == "two_sided"
                )
            return
        pairs.settle_ranks(curvatures)
        found = [pairs.coordinates(curvature, BALANCING_DAMPING) for curvature in curvatures]
        if self.budget is not None and step >= self.budget.first:
            ranks = self.within(curvatures, found, self.budget.advance(step), self.budget.rises)
        else:
            policy = self.policy(step)
            ranks = [
                policy.next_rank(f.energy, c.ranks.rank, f.usable)
                for f, c in zip(found, curvatures, strict=True)
            ]
        self.truncate(curvatures, found, ranks, step)

    def policy(self, step: int) -> RankPolicy:
        """Which rank each pair keeps, decided by its own spectrum."""
        options = self._options
        adapting = step >= options.rank_adaptation_start_step
        threshold = options.rank_adaptation_threshold if adapting else None
        return RankPolicy(options.reprojection_k, threshold, options.min_lora_rank)

    def within(
        self,
        curvatures: Sequence[BucketCurvature],
        found: Sequence[Coordinates],
        parameters: Tensor,
        regrowth: bool = False,
    ) -> list[Tensor]:
        """The ranks of all pairs within a common budget, one ``[S]`` per bucket."""
        bids = [
            Bids(c.factors.price[:, None] * f.energy, c.bucket.direction_size, c.ranks.rank, f.usable)
            for f, c in zip(found, curvatures, strict=True)
        ]
        return ranks_within(bids, parameters, self._options.min_lora_rank, regrowth)

    def truncate(
        self,
        curvatures: Sequence[BucketCurvature],
        found: Sequence[Coordinates],
        ranks: Sequence[Tensor],
        step: int,
        for_good: bool = False,
    ) -> None:
        """Take the coordinates found, with the ranks given."""
        for i, (curvature, coordinates, rank) in enumerate(zip(curvatures, found, ranks, strict=True)):
            pairs.truncate(self._base, curvature, coordinates, rank)
            if self.budget is not None and self.budget.rises:
                pairs.regrow(self._base, curvature, rank, seed=step * len(curvatures) + i)
        self._reduced = self._reduced or for_good or self.budget is not None or self.policy(step).reduces

    def end_step(self, versions: list[int]) -> None:
        """Remember the weights' versions, so that weights loaded before the next step are noticed."""
        self._versions = versions if self._reduced else None

    # ---------------------------------------------------------------- what is known

    def by_name(self, curvatures: Sequence[BucketCurvature]) -> dict[str, int]:
        """Directions kept, by site; sites that were taken out come last, with 0."""
        pairs.settle_ranks(curvatures)
        kept = {name: rank for ranks in self.kept for name, rank in ranks.by_name().items()}
        return {**kept, **dict.fromkeys(self.removed, 0)}

    def dropped(self) -> dict[str, float]:
        """Predicted rise of the loss by what was given up so far, by site."""
        return self.removed | {n: cost for ranks in self.kept for n, cost in ranks.dropped_by_name().items()}

    def predicted_cost(self) -> Tensor | float:
        """Sum of :meth:`dropped`, not read back from the device."""
        gone, dropped = sum(self.removed.values()), [ranks.dropped.sum() for ranks in self.kept]
        return torch.stack([d.to(dropped[0].device) for d in dropped]).sum() + gone if dropped else gone

    def remove(self, dropped: Mapping[str, float]) -> None:
        """Remember pairs that were taken out, with what that was predicted to cost."""
        self.removed.update(dropped)

    def coordinates(self, curvatures: Sequence[BucketCurvature]) -> list[Coordinates]:
        """The pairs' balanced coordinates now, one entry per bucket."""
        pairs.settle_ranks(curvatures)
        return [pairs.coordinates(curvature, BALANCING_DAMPING) for curvature in curvatures]

    def report(
        self,
        curvatures: Sequence[BucketCurvature],
        kept: Mapping[str, int],
        found: Sequence[Coordinates],
        costs: Mapping[str, float],
    ) -> RankReport:
        """All that is known, with ``kept`` directions per site at a further cost of ``costs``."""
        threshold, dropped = self._options.reported_threshold, self.dropped()
        effective: dict[str, tuple[float | None, int | None]] = {}
        for c, f in zip(curvatures, found, strict=True):
            spectrum = torch.where(f.usable[:, None], f.spectrum, 0.0)
            effective.update(zip(c.bucket.names(), effective_ranks(spectrum, threshold), strict=True))
        sites = []
        for name, origin in self.origin.items():
            if name not in kept:
                continue  # its adapter was replaced or deleted
            rank, size = kept[name], origin.parameters // origin.rank
            loss = dropped[name] + costs.get(name, 0.0)
            entropy, count = effective.get(name, (None, None))
            sites.append(
                SiteRank(name, rank, origin.rank, entropy, count, rank * size, origin.parameters, loss)
            )
        return RankReport(sites, threshold)

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the ranks of each site."""
        return {
            "reprojection": self._options.reprojection,
            "reprojections": self.reprojections,
            "origin": {name: list(origin) for name, origin in self.origin.items()},
            "removed": dict(self.removed),
            "budget": {} if self.budget is None else self.budget.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], sites: Sequence[Site]) -> None:
        """Go on from a checkpoint, or start anew from an empty one; the ranks of each site are there already."""
        self.reprojections = state.get("reprojections", 0)
        self.removed = dict(state.get("removed", {}))
        self._versions = None
        self.budget = None
        origin = {name: Origin(*values) for name, values in state.get("origin", {}).items()}
        self.remember([] if origin else sites, origin)
        if self.budget is not None:
            self.budget.load(state.get("budget", {}))
        for ranks in self.kept:
            first = [self.origin[name].rank for name in ranks.bucket.names()]
            ranks.first = torch.tensor(first, device=ranks.bucket.device)
        self._forget_ranks_of_the_paper(state)
        self._reduced = any(bool((ranks.rank < ranks.bucket.rank).any()) for ranks in self.kept)

    def _forget_ranks_of_the_paper(self, state: Mapping[str, Any]) -> None:
        """Keep all rows where the paper's projections left a rank: all of them are in use, and must not be cleared."""
        now = self._options.reprojection
        before = state.get(
            "reprojection", now if now == "balanced" else PAPER_PROJECTIONS[0]
        )  # older: not said
        if before in PAPER_PROJECTIONS and self.gives_up:
            for ranks in self.kept:
                ranks.rank = torch.full_like(ranks.rank, ranks.bucket.rank)
