"""Cut LoRA pairs, with their gradients, state and factors, to the ranks that they keep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import nn
from torch.optim import Optimizer

from grit_optim.base.transport import narrow_state
from grit_optim.checkpoints.narrowing import narrowed
from grit_optim.export import peft_config
from grit_optim.export.peft_models import Home, homes
from grit_optim.linalg import full_precision
from grit_optim.lora.discovery import (
    adapter_layers,
    layers_of_pairs,
    modules_of_pairs,
    resize_layer,
)
from grit_optim.lora.site import Site
from grit_optim.messages import warn
from grit_optim.parts import Parts
from grit_optim.processes import shards


@full_precision()
def shrink(parts: Parts, model: nn.Module | None) -> None:
    """Cut A, B, their gradients, the base's state and the factors to the ranks that are kept.

    Args:
        parts: of the optimizer.
        model: the PEFT model, or None for the one that the optimizer knows.

    Raises:
        ValueError: the paper's projections are in use, FSDP2 holds the pairs, no rank is left, PEFT's layers
            without their model, DoRA, or a start that depends on the rank.
    """
    if not parts.ranks.gives_up:
        raise ValueError(
            f"reprojection={parts.options.ranks.reprojection!r} gives no rank up for good, so there is "
            "nothing to shrink. Build the optimizer with reprojection='balanced' or 'none'"
        )
    sites = parts.sites.present()
    if any(shards.is_shared(matrix) for site in sites for matrix in (site.a, site.b)):
        raise ValueError(
            "FSDP2 shares the pairs out over processes, and has noted their shapes, so shrink_() cannot cut "
            "them. Save them with save_adapter(), and load that into a new model before fully_shard()"
        )
    found = check(parts.known_model(model), sites)
    layers = {key: pair for home in found for key, pair in layers_of_pairs(home.peft_model).items()}
    configs = [config for home in found for config in home.peft_model.peft_config.values()]
    with parts.all_or_nothing(*modules_of_pairs(sites, layers), *configs):
        _shrink(parts, sites, layers, found)


def _shrink(
    parts: Parts, sites: list[Site], layers: Mapping[int, tuple[str, Any]], found: Sequence[Home]
) -> None:
    parts.preconditioning.to_plain_coordinates(parts.curvature)
    parts.ranks.settle(parts.curvature.buckets)
    kept, dropped = parts.ranks.by_name(), parts.ranks.dropped()
    if not any(kept.values()):
        raise ValueError(
            "no site keeps a direction, so nothing would be left to train; reduce the ranks less"
        )
    # PEFT keeps no trained bias without a pair.
    sizes = {site.name: max(kept[site.name], int(site.trains_bias)) for site in sites}
    gone = [site for site in sites if sizes[site.name] == 0]
    check_starts(found, sizes)
    known = parts.pack_sites(with_operators=True)
    narrow(parts.base, sites, sizes, layers)
    for home in found:
        update_configs(home, gone)
    parts.ranks.remove({site.name: dropped[site.name] for site in gone})
    left = [site for site in sites if sizes[site.name] > 0]
    parts.attach(left, narrowed(parts.curvature.buckets, known, {s.name: sizes[s.name] for s in left}))


def check(model: nn.Module | None, sites: Sequence[Site]) -> list[Home]:
    """The PEFT models that hold the sites; none for hand-written LoRA.

    Raises:
        ValueError: a PEFT model, which holds the configuration, is not known, or an adapter is DoRA.
    """
    if not any(site.in_peft for site in sites):
        return []
    if model is None:
        raise ValueError("this optimizer no longer knows its model (it was copied or unpickled); pass model=")
    found = homes(model, sites)
    for home in found:
        for adapter in home.adapters():
            peft_config.check_exportable(home.peft_model.peft_config[adapter], adapter)
    return found


def check_starts(found: Iterable[Home], sizes: Mapping[str, int]) -> None:
    """Refuse to cut adapters whose start depends on their rank.

    Raises:
        ValueError: a site of such an adapter would get another rank.
    """
    for home in found:
        for adapter in sorted({site.adapter for site in home.sites if sizes[site.name] != site.rank}):
            peft_config.check_start(home.peft_model.peft_config[adapter], adapter)


def narrow(
    base: Optimizer,
    sites: Iterable[Site],
    sizes: Mapping[str, int],
    layers: Mapping[int, tuple[str, Any]],
) -> None:
    """Cut each site, and what the base keeps of it, to its leading directions.

    Args:
        base: the optimizer that holds the parameters. A site of rank 0 leaves its groups.
        sites: those to cut.
        sizes: name to the directions that are left.
        layers: PEFT's layers, from ``layers_of_pairs``; none for hand-written LoRA.
    """
    strange: set[str] = set()
    removed: set[int] = set()
    for site in sites:
        rank, a, b = sizes[site.name], site.a, site.b
        if rank == site.rank:
            continue
        if rank == 0:
            removed |= {id(a), id(b)}
            for parameter in (a, b):
                base.state.pop(parameter, None)
        else:
            strange |= narrow_state(base, a, 0, rank) | narrow_state(base, b, 1, rank)
        if rank > 0 or not site.in_peft:
            site.narrow_(rank)
        if site.in_peft:
            resize_layer(layers[id(site.a_modules)][1], site.adapter, rank)
    remove_parameters(base, removed)
    if strange:
        warn(
            f"shrink_() does not know how to cut the state that {type(base).__name__} keeps "
            f"({', '.join(sorted(strange))}); it was reset for the LoRA parameters that became smaller. "
            "Training goes on, and the base gathers that state anew"
        )


def remove_parameters(base: Optimizer, removed: Collection[int]) -> None:
    """Take parameters out of the base's groups, and their entries out of every list that goes with them.

    Such a list is ``param_names``, or any other of a group's own that is as long as its ``params``. Settings
    that the base's defaults hold are no such lists (``betas``).

    Args:
        base: the base optimizer.
        removed: ``id(parameter)`` of those that leave.
    """
    for group in base.param_groups:
        stays = [id(p) not in removed for p in group["params"]]
        for key, value in list(group.items()):
            per_parameter = isinstance(value, list | tuple) and len(value) == len(stays)
            if key == "params" or (per_parameter and key not in base.defaults):
                group[key] = type(value)(compress(value, stays))


def update_configs(home: Home, gone: Sequence[Site]) -> None:
    """Write the layers' ranks into PEFT's configuration, and exclude the layers of ``gone``."""
    names = home.layer_names()
    for adapter, config in home.peft_model.peft_config.items():
        layers = adapter_layers(home.peft_model, adapter)
        if not layers.pairs:
            continue
        ranks = {name: site.rank for name, site in layers.pairs.items()}
        new = peft_config.with_ranks(config, layers, ranks, fold_scale=False)
        left_out = [
            names[id(site.a_modules)]
            for site in gone
            if site.adapter == adapter and id(site.a_modules) in names
        ]
        if left_out:
            new.exclude_modules = peft_config.excluding(new.exclude_modules, left_out)
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "exclude_modules"):
            setattr(config, field, getattr(new, field))
