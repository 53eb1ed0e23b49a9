"""The ranks of all sites: what they are, what changes them, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.integrity.fields import Fields, by_name, number, text, whole
from grit_optim.linalg import full_precision
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.kept_ranks import KeptRanks
from grit_optim.lora.site import Site
from grit_optim.options import RankOptions
from grit_optim.options.declared import PAPER_PROJECTIONS, REPROJECTIONS
from grit_optim.profiling import StageTimes
from grit_optim.rank import moves
from grit_optim.rank.budget import unmet
from grit_optim.rank.budgets import Budgets
from grit_optim.rank.coordinates import BALANCING_DAMPING, Coordinates
from grit_optim.rank.origin import Origin, check_saved, origins_of, remembered, saved
from grit_optim.rank.report import RankReport, SiteRank, effective_ranks, known
from grit_optim.rank.selection import RankPolicy


class Ranks:
    """The ranks in force, how training reduces them, and what giving directions up is predicted to cost.

    Attributes:
        kept: the ranks in force, one entry per bucket.
        origin: site name to what the site was when the optimizer was first built.
        removed: site name to the predicted rise of the loss, for sites that were taken out of the model.
        budget: the rank budgets, or None.
        reprojections: how often the sites were reprojected.
    """

    def __init__(self, base: Optimizer, options: RankOptions, times: StageTimes) -> None:
        self.kept: list[KeptRanks] = []
        self.origin: dict[str, Origin] = {}
        self.removed: dict[str, float] = {}
        self.budget: Budgets | None = None
        self.reprojections = 0
        self._unmet: str | None = None  # why the budget cannot be met, unless a checkpoint is loaded first
        self._base = base
        self._options = options
        self._times = times
        # Whether coordinates may have been given up. Whether they were is only known on the device.
        self._reduced = False
        self._versions: list[int] | None = None  # of the weights, at the end of the last step

    # ---------------------------------------------------------------- which sites

    def remember(self, sites: Sequence[Site], origin: Mapping[str, Origin], largest: int = 0) -> None:
        """Note what the sites were at first, and set the budget by it.

        Args:
            sites: the sites as they are now.
            origin: what sites were at first, where that is known already; it overrides ``sites``.
            largest: the most parameters that they can have had at first, where that is not known.

        Raises:
            ValueError: the budget cannot be met, or could not by so many parameters.
        """
        self.origin = remembered(sites, origin)
        before = self.budget.state() if self.budget is not None else {}
        self._unmet = unmet(self._options, self.origin.values(), largest)
        self.budget = Budgets.of(self._options, self.origin.values())
        if self.budget is not None:
            self.budget.load(before)

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Work on the sites of ``buckets`` from now on, with all their directions kept."""
        first = {name: origin.rank for name, origin in self.origin.items()}
        given_up, compensates = self._options.gives_up, self._options.rank_budget is not None
        self.kept = [KeptRanks(bucket, first, given_up, compensates) for bucket in buckets]
        self._versions = None

    # ---------------------------------------------------------------- in a step

    @property
    def follows_loss(self) -> bool:
        """Whether the budget depends on the loss."""
        return self._options.rank_budget_schedule == "adaptive"

    def check_budget(self) -> None:
        """Refuse to train with a budget that only a larger adapter could meet.

        Raises:
            ValueError: the budget cannot be met, and no checkpoint has told that the adapter was larger.
        """
        if self._unmet is not None:
            raise ValueError(
                f"{self._unmet}. An adapter that shrink_() has cut is known by its checkpoint: load that "
                "before the first step"
            )

    def observe(self, loss: Tensor | float | None) -> None:
        """Take note of a step's loss, if the budget depends on it."""
        if loss is not None and self.budget is not None and self.follows_loss:
            self.budget.observe(loss)

    def follow_loaded_weights(
        self, curvatures: Sequence[BucketCurvature], versions: Callable[[], list[int]]
    ) -> None:
        """Take the ranks from the weights, if somebody has changed these since the last step.

        Args:
            curvatures: of the buckets.
            versions: tells how often each A has been changed in place, by now.
        """
        if self._versions is not None and self._versions != versions():
            moves.ranks_from_weights(curvatures)

    def clear_given_up(self, curvatures: Sequence[BucketCurvature]) -> None:
        """Set coordinates that were given up to zero again, whatever the base has done to them."""
        if self._reduced:
            with self._times("reproject"):
                for curvature in curvatures:
                    moves.clear_given_up(curvature)

    @property
    def gives_up(self) -> bool:
        """Whether a dropped direction is given up for good."""
        return self._options.gives_up

    def reproject(self, curvatures: Sequence[BucketCurvature], step: int) -> None:
        """Reproject the sites and adapt their ranks.

        Args:
            curvatures: of the buckets. The base's moments must be in the coordinates of A and B themselves.
            step: number of the step.
        """
        self.reprojections += 1
        if not self.gives_up:
            for curvature in curvatures:
                moves.project(
                    self._base, curvature, self.policy(step), self._options.reprojection == "two_sided"
                )
            return
        self.settle(curvatures)
        found = self.coordinates(curvatures)
        if self.budget is not None and step >= self.budget.first:
            ranks = self.budget.advance(curvatures, found, step)
        else:
            policy = self.policy(step)
            ranks = [
                policy.next_rank(f.energy, c.ranks.rank, f.usable)
                for f, c in zip(found, curvatures, strict=True)
            ]
        self.truncate(curvatures, found, ranks, step)

    def policy(self, step: int) -> RankPolicy:
        """How each site's rank is decided by its own spectrum, as of ``step``."""
        options = self._options
        adapting = step >= options.rank_adaptation_start_step
        threshold = options.rank_adaptation_threshold if adapting else None
        return RankPolicy(options.reprojection_k, threshold, options.min_lora_rank)

    def truncate(
        self,
        curvatures: Sequence[BucketCurvature],
        found: Sequence[Coordinates],
        ranks: Sequence[Tensor],
        step: int,
        for_good: bool = False,
    ) -> None:
        """Drop directions: bring the sites to the coordinates ``found``, with the given ranks.

        Where no site drops any, all keep their coordinates, and with them whatever has been averaged over
        steps. Where the budget rises, sites that are given a higher rank than theirs take further directions
        into use. Reads from the device whether a site drops any.

        Args:
            curvatures: of the buckets.
            found: balanced coordinates, one entry per bucket.
            ranks: the rank of each site from now on ``[S]``, one tensor per bucket.
            step: number of the step.
            for_good: whether the user asked for it, apart from any policy or budget.
        """
        cut = any(bool((rank < c.ranks.rank).any()) for c, rank in zip(curvatures, ranks, strict=True))
        for i, (curvature, coordinates, rank) in enumerate(zip(curvatures, found, ranks, strict=True)):
            if cut:
                moves.truncate(self._base, curvature, coordinates, rank)
            if self.budget is not None and self.budget.rises:
                moves.regrow(self._base, curvature, rank, seed=step * len(curvatures) + i)
        self._reduced = self._reduced or for_good or self.budget is not None or self.policy(step).reduces

    def end_step(self, versions: Callable[[], list[int]]) -> None:
        """Remember the weights' versions, so that weights loaded before the next step are noticed."""
        self._versions = versions() if self._reduced else None

    # ---------------------------------------------------------------- what is known

    def settle(self, curvatures: Sequence[BucketCurvature]) -> None:
        """Take the ranks from the weights, before something is done by them."""
        moves.ranks_from_weights(curvatures)

    def as_settled(self, curvatures: Sequence[BucketCurvature]) -> tuple[Ranks, list[BucketCurvature]]:
        """Copies of these ranks and of the curvatures, as :meth:`settle` would leave them.

        Questions are asked of the copies, so that no question changes training.
        """
        copies = [curvature.view() for curvature in curvatures]
        moves.ranks_from_weights(copies)
        seen = copy(self)
        seen.kept = [curvature.ranks for curvature in copies]
        return seen, copies

    def by_name(self) -> dict[str, int]:
        """Directions kept, by site name. Sites that were taken out come last, with 0."""
        kept = {name: rank for ranks in self.kept for name, rank in ranks.by_name().items()}
        return {**kept, **dict.fromkeys(self.removed, 0)}

    def dropped(self) -> dict[str, float]:
        """Predicted rise of the loss by everything given up so far, by site name; infinite if unknown."""
        return self.removed | {n: cost for ranks in self.kept for n, cost in ranks.dropped_by_name().items()}

    def predicted_cost(self) -> Tensor | float:
        """The sum of :meth:`dropped`, left on the device."""
        gone, dropped = sum(self.removed.values()), [ranks.dropped.sum() for ranks in self.kept]
        return torch.stack([d.to(dropped[0].device) for d in dropped]).sum() + gone if dropped else gone

    def remove(self, dropped: Mapping[str, float]) -> None:
        """Remember sites that are taken out of the model.

        Args:
            dropped: site name to the predicted rise of the loss by all its directions.
        """
        self.removed.update(dropped)

    @full_precision()
    def coordinates(self, curvatures: Sequence[BucketCurvature]) -> list[Coordinates]:
        """The sites' balanced coordinates now, one entry per bucket."""
        return [moves.coordinates(curvature, BALANCING_DAMPING) for curvature in curvatures]

    def report(
        self,
        curvatures: Sequence[BucketCurvature],
        kept: Mapping[str, int],
        found: Sequence[Coordinates],
        costs: Mapping[str, float],
    ) -> RankReport:
        """What is known of each site's rank.

        Args:
            curvatures: of the buckets.
            kept: directions kept, by site name. Other sites are left out.
            found: balanced coordinates, one entry per bucket.
            costs: predicted rise of the loss beside that of what was given up already, by site name.
        """
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
            loss = known(dropped[name] + costs.get(name, 0.0))
            entropy, count = effective.get(name, (None, None))
            known_of = rank * size, origin.parameters, loss, origin.modality
            sites.append(SiteRank(name, rank, origin.rank, entropy, count, *known_of))
        return RankReport(sites, threshold)

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside each site's own state."""
        return {
            "reprojection": self._options.reprojection,
            "reprojections": self.reprojections,
            "origin": saved(self.origin),
            "removed": dict(self.removed),
            "budget": {} if self.budget is None else self.budget.state(),
        }

    @staticmethod
    def saved_fields(sites: Collection[str]) -> Fields:
        """What a checkpoint of ``sites`` may hold under the names of :meth:`state_dict`."""
        return {
            "reprojection": text(REPROJECTIONS),
            "reprojections": whole(),
            "origin": by_name(check_saved, sites),
            "removed": by_name(number(low=0, finite=False)),
            "budget": Budgets.check_saved,
        }

    def load_state_dict(self, state: Mapping[str, Any], sites: Sequence[Site]) -> None:
        """Go on from a checkpoint; from an empty one, start anew. Each site's own state is loaded already."""
        self.reprojections = state.get("reprojections", 0)
        self.removed = dict(state.get("removed", {}))
        self._versions = None
        self.budget = None
        origin = origins_of(state)
        self.remember([site for site in sites if site.name not in origin], origin)
        if self.budget is not None:
            self.budget.load(state.get("budget", {}))
        for ranks in self.kept:
            ranks.started_from({name: origin.rank for name, origin in self.origin.items()})
        self._forget_ranks_of_the_paper(state)
        self._reduced = any(bool((ranks.rank < ranks.bucket.rank).any()) for ranks in self.kept)

    def _forget_ranks_of_the_paper(self, state: Mapping[str, Any]) -> None:
        """Keep all rows where the paper's projections left a rank: all are in use, none may be cleared."""
        now = self._options.reprojection
        # Older checkpoints do not say which reprojection they come from.
        before = state.get("reprojection", now if now == "balanced" else PAPER_PROJECTIONS[0])
        if before in PAPER_PROJECTIONS and self.gives_up:
            for ranks in self.kept:
                ranks.keep_all()
