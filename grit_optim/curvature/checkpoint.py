"""GRIT's own part of a ``state_dict``: plain containers and fp32 tensors, keyed by site name.

What can be derived from the factors at the next step is left out. The operators are saved only where they
come from factors that have moved on since, or where the base's moments are expressed in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from grit_optim.curvature.bucket import Curvature
from grit_optim.curvature.factors import Factors
from grit_optim.options import listed

VERSION = 1
KEY = "grit"
_FACTORS = tuple(f.name for f in fields(Factors))
_OPERATORS = ("a_operator", "b_operator", "a_ready", "b_ready", "a_penalty", "b_penalty")

SiteState = dict[str, Tensor]


def pack_sites(curvatures: Iterable[Curvature], with_operators: bool) -> dict[str, SiteState]:
    """Each site's state as tensors of its own: name to ``{"activation": [r, r], …, "rank": []}``."""
    packed = {}
    for curvature in curvatures:
        for position, name in enumerate(curvature.bucket.names()):
            state = {key: getattr(curvature.factors, key)[position].clone() for key in _FACTORS}
            state["rank"], state["dropped"] = (
                curvature.rank[position].clone(),
                curvature.dropped[position].clone(),
            )
            if with_operators:
                state.update(
                    {k: v[position].clone() for k in _OPERATORS if (v := getattr(curvature, k)) is not None}
                )
            if curvature.moments is not None:
                state.update(curvature.moments.pack(position, with_operators))
            packed[name] = state
    return packed


def narrowed(state: SiteState, rank: int) -> SiteState:
    """A site's state for its leading ``rank`` coordinates alone: ``[r, r]`` to ``[rank, rank]``."""
    return {key: value[:rank, :rank].clone() if value.dim() == 2 else value for key, value in state.items()}


def unpack_sites(curvatures: Iterable[Curvature], packed: Mapping[str, SiteState]) -> None:
    """Put saved states into new curvatures; a site that has none, or whose rank differs, keeps what it has."""
    for curvature in curvatures:
        for position, name in enumerate(curvature.bucket.names()):
            state = packed.get(name)
            if state is None or state["activation"].shape[-1] != curvature.bucket.rank:
                continue
            for key in _FACTORS:
                if key in state:  # checkpoints from before there was a price have none
                    getattr(curvature.factors, key)[position].copy_(state[key])
            curvature.rank[position].copy_(state["rank"])
            if "dropped" in state:
                curvature.dropped[position].copy_(state["dropped"])
            if curvature.moments is not None:
                curvature.moments.unpack(position, state)
            for key in _OPERATORS:
                if key in state and getattr(curvature, key) is not None:
                    getattr(curvature, key)[position].copy_(state[key])


def check(saved: Mapping[str, Any], curvatures: Iterable[Curvature]) -> None:
    """Refuse a checkpoint that does not belong to these sites, before anything is changed.

    Raises:
        ValueError: the version is newer, site names differ, or a site's rank does.
    """
    if saved.get("version", 0) > VERSION:
        raise ValueError(
            f"the checkpoint's GRIT state has version {saved['version']}, this grit_optim reads up to {VERSION}; upgrade "
            "grit_optim"
        )
    ranks = {name: c.bucket.rank for c in curvatures for name in c.bucket.names()}
    saved_sites = saved["sites"]
    missing, extra = sorted(ranks.keys() - saved_sites.keys()), sorted(saved_sites.keys() - ranks.keys())
    if missing or extra:
        raise ValueError(
            f"the checkpoint's GRIT state is of other LoRA sites: {_some(missing)} of this model not in it, {_some(extra)} of "
            "the checkpoint not in this model. Build the model and its adapter as they were when the checkpoint was saved, "
            f"or drop the state with `state_dict.pop({KEY!r})` to start the curvature anew"
        )
    for name, rank in ranks.items():
        saved_rank = saved_sites[name]["activation"].shape[-1]
        if saved_rank != rank:
            raise ValueError(
                f"site {name!r} has rank {rank}, in the checkpoint {saved_rank}; build the adapter with the checkpoint's rank"
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({listed(names, 3)})" if names else "none"
