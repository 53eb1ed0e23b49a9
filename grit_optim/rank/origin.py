"""What the sites were when the optimizer was first built, which budgets and reports refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grit_optim.integrity.fields import several, text, whole
from grit_optim.lora.site import Site
from grit_optim.options.declared import MODALITIES


class Origin(NamedTuple):
    """A site's rank and the parameters of its A and B at first, and its modality, if it has one."""

    rank: int
    parameters: int
    modality: str | None = None


def remembered(sites: Sequence[Site], origin: Mapping[str, Origin]) -> dict[str, Origin]:
    """What sites were at first: what is known of it already, else what they are now.

    Args:
        sites: the sites as they are now.
        origin: what is known. Older checkpoints do not tell modalities; these are then those of ``sites``.
    """
    found = {site.name: Origin(site.rank, site.parameters, site.modality) for site in sites}
    for name, first in origin.items():
        now = found.get(name, first)
        found[name] = first._replace(modality=first.modality or now.modality)
    return found


def saved(origins: Mapping[str, Origin]) -> dict[str, list[Any]]:
    """Plain values for a checkpoint; without a modality where there is none."""
    return {name: [value for value in origin if value is not None] for name, origin in origins.items()}


def check_saved(path: str, value: Any) -> None:
    """Refuse what is no saved origin.

    Raises:
        ValueError: it is none.
    """
    with_modality = isinstance(value, list | tuple) and len(value) > 2
    several(whole(1), 2)(path, value[:2] if with_modality else value)
    if with_modality:
        several(text(MODALITIES), 1)(path, value[2:])


def origins_of(state: Mapping[str, Any]) -> dict[str, Origin]:
    """What each site was when the optimizer was first built, from a checkpoint; empty in older ones."""
    return {name: Origin(*values) for name, values in state.get("origin", {}).items()}
