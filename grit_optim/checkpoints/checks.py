"""Check the saved state of an optimizer's parts before any of it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from grit_optim.capture.capture import Capture
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.curvature.curvature import in_operators
from grit_optim.curvature.kinds import KindFactors
from grit_optim.integrity.fields import Fields, alike, by_name, record, text, whole
from grit_optim.lora.kept_ranks import KeptRanks
from grit_optim.lora.site import Site
from grit_optim.messages import listed
from grit_optim.options.declared import FISHERS
from grit_optim.preconditioners.modes import MODES
from grit_optim.preconditioners.penalties import Penalties
from grit_optim.preconditioners.preconditioning import Preconditioning
from grit_optim.rank.adaptation import Ranks
from grit_optim.schedules import Schedule

VERSION = 1
KEY = "grit"
"""The key of a ``state_dict()`` under which the state of the parts lies."""

_LATER = ("price", "dropped", "by_gradients")
"""A site's entries that older checkpoints lack."""


def names_of_sites(own: Any) -> Collection[str]:
    """The sites of a saved state.

    Raises:
        ValueError: the version is newer than this one, or there is no dict of sites.
    """
    record({"sites": by_name(record({}))}, {"version": whole()})(KEY, own)
    if own.get("version", 0) > VERSION:
        raise ValueError(
            f"the checkpoint's GRIT state has version {own['version']}, this grit_optim reads up to "
            f"{VERSION}; upgrade grit_optim"
        )
    names: Collection[str] = own["sites"].keys()
    return names


def check_state(own: Mapping[str, Any], sites: Sequence[Site]) -> None:
    """Refuse a saved state that is not of these sites, or that is damaged.

    Args:
        own: the state, of which :func:`names_of_sites` has found the sites.
        sites: those that are to go on from it.

    Raises:
        ValueError: names or ranks of sites differ; or an entry is missing, of the wrong type or shape, out of
            range, or not finite.
    """
    saved = own["sites"]
    _check_names({site.name for site in sites}, saved.keys())
    for site in sites:
        shape: tuple[int, ...] = getattr(saved[site.name].get("activation"), "shape", ())
        if len(shape) == 2 and shape[0] == shape[1] != site.rank:
            raise ValueError(
                f"site {site.name!r} has rank {site.rank}, in the checkpoint {shape[0]}; build the adapter "
                "with the checkpoint's rank"
            )
    must, may = _fields([site.name for site in sites])
    record(must, may)(KEY, own)
    mode, fisher = MODES[own["precondition"]], own.get("fisher", "kfac")
    with_operators = mode.moments_in_operators or in_operators(fisher)
    rotations = mode.operators_rotate or in_operators(fisher)
    for site in sites:
        must, may = _site_fields(site, fisher, with_operators, rotations)
        record(must, may)(f"{KEY}['sites'][{site.name!r}]", saved[site.name])
    alike()(f"{KEY}['sites']", saved)


def _fields(names: Sequence[str]) -> tuple[Fields, Fields]:
    """What a checkpoint of the sites of these names must, and what else it may hold beside their states."""
    steps = Schedule.saved_fields()
    must = {"steps": steps["steps"], **Preconditioning.saved_fields()}
    may = {**steps, **Capture.saved_fields(), **Ranks.saved_fields(names), "fisher": text(FISHERS)}
    return must, {name: field for name, field in may.items() if name not in must}


def _site_fields(site: Site, fisher: str, with_operators: bool, rotations: bool) -> tuple[Fields, Fields]:
    """What a checkpoint must, and what else it may hold of a pair.

    Args:
        site: the pair.
        fisher: the option ``fisher`` of the run that was saved.
        with_operators: whether moments are expressed in the operators, which it then must hold.
        rotations: whether the operators are eigenvectors.
    """
    known = {
        **BucketCurvature.saved_fields(fisher, site, rotations),
        **KeptRanks.saved_fields(site.rank),
        **Penalties.saved_fields(site.rank),
    }
    operators = {name for name in known if name.endswith(("_operator", "_ready"))}
    derived = {name for name in known if name.endswith("_penalty") or "_scale_" in name}
    may = {*_LATER, *KindFactors.saved_fields(site.rank), *derived, *(() if with_operators else operators)}
    return {n: f for n, f in known.items() if n not in may}, {n: f for n, f in known.items() if n in may}


def _check_names(here: Set[str], saved: Set[str]) -> None:
    missing, extra = sorted(here - saved), sorted(saved - here)
    if missing or extra:
        raise ValueError(
            f"the checkpoint's GRIT state is of other LoRA sites: {_some(missing)} of this model not in it, "
            f"{_some(extra)} of the checkpoint not in this model. Build the model and its adapter as they "
            f"were when the checkpoint was saved, or drop the state with `state_dict.pop({KEY!r})` to start "
            "the curvature anew"
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({listed(names, 3)})" if names else "none"
