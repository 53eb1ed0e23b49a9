"""The ranks that budgets leave: one for all pairs, one for each modality, or one that sizes itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.integrity.fields import by_name, record, whole
from grit_optim.options import RankOptions
from grit_optim.options.declared import MODALITIES
from grit_optim.rank.budget import BudgetSchedule, make_schedules
from grit_optim.rank.coordinates import Coordinates
from grit_optim.rank.origin import Origin
from grit_optim.rank.selection import Bids, ranks_within


class Budgets:
    """The budgets of a run.

    Attributes:
        courses: the course of each part's budget; "" for all pairs together.
        sizes: with ``rank_budget="effective"``, the rank that each site comes to, by name, as far as known.
    """

    def __init__(self, options: RankOptions, courses: Mapping[str, BudgetSchedule]) -> None:
        self.courses = dict(courses)
        self.sizes: dict[str, int] = {}
        self._options = options

    @classmethod
    def of(cls, options: RankOptions, origins: Collection[Origin]) -> Budgets | None:
        """The budgets that the options ask for; None without any, and while no pair is trained.

        Args:
            options: the rank options.
            origins: all sites as they were at first.
        """
        courses = make_schedules(options, origins)
        return cls(options, courses) if courses else None

    @property
    def first(self) -> int:
        """The step at which the budgets begin to change."""
        return next(iter(self.courses.values())).first

    @property
    def rises(self) -> bool:
        """Whether a budget rises, so that directions are given back."""
        return any(course.rises for course in self.courses.values()) and not self._options.sizes_itself

    def observe(self, loss: Tensor | float) -> None:
        """Take note of a loss of training or of held-out data."""
        for course in self.courses.values():
            course.observe(loss)

    def advance(
        self, curvatures: Sequence[BucketCurvature], found: Sequence[Coordinates], step: int
    ) -> list[Tensor]:
        """The rank of each site as of ``step``, one ``[S]`` per bucket. Call it once per reprojection.

        Args:
            curvatures: of the buckets.
            found: their balanced coordinates.
            step: number of the step.
        """
        floor = self._options.min_lora_rank
        if self._options.sizes_itself:
            measured = effective_sizes(curvatures, found, self._options)
            self.sizes = {**measured, **self.sizes}
            return on_the_way(curvatures, self.sizes, float(self.courses[""].advance(step)))
        allowed = {part: course.advance(step) for part, course in self.courses.items()}
        rising = [part for part, course in self.courses.items() if course.rises]
        return ranks_of_parts(curvatures, found, allowed, floor, rising)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as tensors and numbers."""
        if "" not in self.courses:
            return {part: course.state() for part, course in self.courses.items()}
        return {**self.courses[""].state(), **({"sizes": dict(self.sizes)} if self.sizes else {})}

    @staticmethod
    def check_saved(path: str, value: Any) -> None:
        """Refuse what :meth:`state` cannot have saved.

        Raises:
            ValueError: it cannot.
        """
        course = record(BudgetSchedule.saved_fields(), {"sizes": by_name(whole())})
        if isinstance(value, Mapping) and value and set(value) <= set(MODALITIES):
            course = by_name(course)
        if value != {}:
            course(path, value)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. One of other parts, like an empty one, changes nothing."""
        by_part = not state or set(state) <= set(MODALITIES)
        for part, course in self.courses.items():
            course.load(state.get(part, {}) if by_part else {} if part else dict(state))
        self.sizes = dict(state.get("sizes", {}))


def ranks_of_parts(
    curvatures: Sequence[BucketCurvature],
    found: Sequence[Coordinates],
    allowed: Mapping[str, Tensor],
    floor: int,
    rising: Collection[str] = (),
) -> list[Tensor]:
    """The ranks of all sites within the budget of each part, one ``[S]`` per bucket.

    Args:
        curvatures: of the buckets.
        found: balanced coordinates, one entry per bucket.
        allowed: modality to its budget in parameters, a scalar tensor; "" for all sites. Sites of no part
            that it names keep their rank.
        floor: ``min_lora_rank``.
        rising: parts whose ranks may rise.
    """
    ranks = [c.ranks.rank.clone() for c in curvatures]
    for part, budget in allowed.items():
        members = [_members(c, part) for c in curvatures]
        there = [i for i, places in enumerate(members) if places is None or places.numel()]
        bids = [_bids(curvatures[i], found[i], members[i]) for i in there]
        for i, kept in zip(there, ranks_within(bids, budget, floor, part in rising), strict=True):
            places = members[i]
            ranks[i] = kept if places is None else ranks[i].index_copy(0, places, kept)
    return ranks


def _members(curvature: BucketCurvature, part: str) -> Tensor | None:
    """Places of a part's sites in their bucket; None for all."""
    if not part:
        return None
    places = [i for i, site in enumerate(curvature.bucket.sites) if site.modality == part]
    return torch.tensor(places, dtype=torch.int64, device=curvature.bucket.device)


def _bids(curvature: BucketCurvature, found: Coordinates, places: Tensor | None) -> Bids:
    """What the sites at some places, or all, bring to the competition."""
    loss = curvature.factors.price[:, None] * found.energy
    bids = Bids(loss, curvature.bucket.direction_size, curvature.ranks.rank, found.usable)
    return bids if places is None else Bids(*(getattr(bids, f.name)[places] for f in fields(bids)))


# -------------------------------------------------------------------- the budget that sizes itself


def effective_sizes(
    curvatures: Sequence[BucketCurvature], found: Sequence[Coordinates], options: RankOptions
) -> dict[str, int]:
    """For each site whose factors have enough samples, its effective rank times the factor, by name.

    The effective rank is that of Σ_a's eigenvalues (Roy and Vetterli 2007); the result is rounded up, and at
    least ``min_lora_rank``.

    Args:
        curvatures: of the buckets.
        found: their balanced coordinates, which say for which sites there are enough samples.
        options: the rank options.
    """
    sizes = {}
    for curvature, coordinates in zip(curvatures, found, strict=True):
        values, _ = linalg.leading_eigenbasis(curvature.factors.activation.double(), curvature.ranks.mask)
        wanted = (options.effective_rank_factor * linalg.effective_rank(values)).tolist()
        for name, size, known in zip(
            curvature.bucket.names(), wanted, coordinates.usable.tolist(), strict=True
        ):
            if known:
                sizes[name] = max(options.min_lora_rank, math.ceil(size - 1e-6))
    return sizes


def on_the_way(curvatures: Sequence[BucketCurvature], sizes: Mapping[str, int], left: float) -> list[Tensor]:
    """The ranks with the share ``left`` of the way from the first ones to ``sizes`` to go, ``[S]`` each.

    No rank rises, and sites of unknown size keep theirs.
    """
    found = []
    for curvature in curvatures:
        now, first = curvature.ranks.rank.tolist(), curvature.ranks.first.tolist()
        ranks = [
            min(rank, sizes[name] + math.ceil(max(0, start - sizes[name]) * left)) if name in sizes else rank
            for name, rank, start in zip(curvature.bucket.names(), now, first, strict=True)
        ]
        found.append(torch.tensor(ranks, dtype=torch.int64, device=curvature.bucket.device))
    return found
