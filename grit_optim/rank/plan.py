"""Planning a reduction of ranks that the user asks for, by a budget or site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.lora.site import Site
from grit_optim.messages import listed, nearest
from grit_optim.options import Options
from grit_optim.options.checks import EFFECTIVE, budget_value
from grit_optim.options.declared import MODALITIES
from grit_optim.rank import budget, moves
from grit_optim.rank.adaptation import Ranks
from grit_optim.rank.budgets import effective_sizes, on_the_way, ranks_of_parts
from grit_optim.rank.coordinates import Coordinates


class Plan(NamedTuple):
    """Balanced coordinates, and the ranks to keep in them.

    Attributes:
        found: balanced coordinates, one entry per bucket.
        wanted: ranks to keep ``[S]``, one tensor per bucket.
    """

    found: list[Coordinates]
    wanted: list[Tensor]

    def costs(self, curvatures: Sequence[BucketCurvature]) -> dict[str, float]:
        """The predicted rise of the loss by site name, in the loss's unit."""
        return {
            name: cost
            for c, f, w in zip(curvatures, self.found, self.wanted, strict=True)
            for name, cost in zip(c.bucket.names(), moves.predicted_loss(c, f, w).tolist(), strict=True)
        }

    def ranks(self, curvatures: Sequence[BucketCurvature]) -> dict[str, int]:
        """The ranks to keep, by site name."""
        return {
            name: rank
            for c, w in zip(curvatures, self.wanted, strict=True)
            for name, rank in zip(c.bucket.names(), w.tolist(), strict=True)
        }


def make_plan(
    ranks: Ranks,
    curvatures: Sequence[BucketCurvature],
    options: Options,
    wanted: float | str | Mapping[str, Any],
) -> Plan:
    """Plan which ranks to keep. Nothing is changed.

    Args:
        ranks: the ranks in force.
        curvatures: of the buckets.
        options: all options.
        wanted: a budget as ``rank_budget`` takes it, or site name to rank. Sites that are not named keep
            theirs.

    Raises:
        TypeError: ``wanted`` is neither a budget nor a mapping.
        ValueError: a site is unknown, a rank is above the site's, the budget cannot be met, factors have too
            few samples, or the options let no rank be given up for good.
    """
    if not options.ranks.gives_up:
        raise ValueError(
            f"with reprojection={options.ranks.reprojection!r} no rank is given up for good: every row of A "
            "stays in use. Build the optimizer with reprojection='balanced' or 'none'"
        )
    if options.curvature.fisher != "kfac":
        raise ValueError(
            f"fisher={options.curvature.fisher!r} keeps moments of gradients in the coordinates of A and B, "
            "which change where ranks are given up. Build the optimizer with fisher='kfac'"
        )
    fixed = {site.name: site for c in curvatures for site in c.bucket.sites if site.fixed}
    found = ranks.coordinates(curvatures)
    _check_ready(curvatures, found, options.curvature.kfac_min_samples)
    if isinstance(wanted, Mapping) and not set(wanted) <= set(MODALITIES):
        _check_movable(fixed, wanted)
        return Plan(found, _named(ranks.by_name(), curvatures, wanted))
    if wanted == EFFECTIVE:
        return Plan(found, on_the_way(curvatures, effective_sizes(curvatures, found, options.ranks), 0.0))
    by_part: Mapping[str, Any] = wanted if isinstance(wanted, Mapping) else {"": wanted}
    allowed = {part: _allowed(ranks, fixed, options, part, own) for part, own in by_part.items()}
    return Plan(found, ranks_of_parts(curvatures, found, allowed, options.ranks.min_lora_rank))


def _allowed(ranks: Ranks, fixed: Mapping[str, Site], options: Options, part: str, wanted: float) -> Tensor:
    """The parameters that a part may keep, "" for all pairs, a scalar.

    Raises:
        TypeError: no budget.
        ValueError: a budget that cannot be met, or a part without pairs.
    """
    name = f"the rank budget of the {part} part" if part else "the rank budget"
    budget_value(name, wanted)
    # Pairs that cannot lose directions keep theirs, beside the budget of the others.
    movable = [origin for name, origin in ranks.origin.items() if name not in fixed]
    origins = budget.of_part(movable, part)
    if part and not origins:
        raise ValueError(f"{name}={wanted!r}: no pair of that part is trained that could lose directions")
    budget.check(name, wanted, origins, options.ranks.min_lora_rank)
    beside = sum(site.parameters for site in fixed.values() if not part or site.modality == part)
    allowed = budget.parameters(wanted, budget.full_parameters(origins)) + beside
    return torch.tensor(allowed, dtype=torch.float64, device="cpu")


def _check_movable(fixed: Mapping[str, Site], wanted: Mapping[str, int]) -> None:
    """Refuse ranks for pairs that cannot lose directions.

    Raises:
        ValueError: one of ``fixed`` is to have another rank than it has.
    """
    asked = {name: site.untapped for name, site in fixed.items() if wanted.get(name, site.rank) != site.rank}
    if asked:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(asked.items())[:3])
        raise ValueError(
            f"the directions of {len(asked)} site(s) cannot be given up one by one ({reasons}). Leave them "
            "out of the mapping: they keep their rank"
        )


def _check_ready(
    curvatures: Sequence[BucketCurvature], found: Sequence[Coordinates], kfac_min_samples: int
) -> None:
    """Refuse to plan while the factors of a site have too few samples.

    Raises:
        ValueError: the balanced coordinates of a site could not be derived.
    """
    unready = [
        name
        for c, f in zip(curvatures, found, strict=True)
        for name, ready in zip(
            c.bucket.names(), (f.usable | c.bucket.fixed | (c.ranks.rank == 0)).tolist(), strict=True
        )
        if not ready
    ]
    if unready:
        raise ValueError(
            f"nothing is known yet of the curvature of {len(unready)} site(s) ({listed(unready)}), so no "
            f"loss can be predicted. Train until each has seen kfac_min_samples={kfac_min_samples} tokens "
            "with a B that is not zero. Export an adapter that was trained elsewhere as it is, with "
            "grit_optim.export_adapter(model, path)"
        )


def _named(
    known: Mapping[str, int], curvatures: Sequence[BucketCurvature], wanted: Mapping[str, int]
) -> list[Tensor]:
    """The ranks that a mapping asks for, one ``[S]`` per bucket. Sites that it does not name keep theirs.

    Raises:
        ValueError: a site is unknown, or a rank is not a whole number from 0 to the site's own.
    """
    for name, rank in wanted.items():
        if name not in known:
            close = nearest(name, known)
            hint = f"Did you mean {close!r}? " if close else ""
            raise ValueError(
                f"unknown site {name!r}. {hint}The {len(known)} sites are the keys of optimizer.ranks(): "
                f"{listed(list(known), 3)}"
            )
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= known[name]:
            raise ValueError(
                f"site {name!r} has rank {known[name]}; it can keep a whole number from 0 to that, not "
                f"{rank!r}"
            )
    ranks = [[wanted.get(name, known[name]) for name in c.bucket.names()] for c in curvatures]
    return [
        torch.tensor(values, dtype=torch.int64, device=c.bucket.device)
        for values, c in zip(ranks, curvatures, strict=True)
    ]
