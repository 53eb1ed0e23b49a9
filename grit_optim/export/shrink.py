"""Cut LoRA pairs, with their gradients, state and factors, to the ranks that they keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from grit_optim.base.transport import narrow_state
from grit_optim.export import peft_config
from grit_optim.linalg import full_precision
from grit_optim.lora.discovery import adapter_layers, layers_of_pairs, peft_model_in, resize_layer
from grit_optim.lora.site import Site
from grit_optim.messages import warn
from grit_optim.parts import Parts, narrowed


@full_precision()
def shrink(parts: Parts, model: nn.Module | None) -> None:
    """Cut A, B, their gradients, the base's state and the factors to the ranks that are kept.

    Args:
        parts: of the optimizer.
        model: the PEFT model, or None for the one that the optimizer knows.

    Raises:
        ValueError: the paper's projections are in use, no rank is left, PEFT's layers without their model,
            DoRA, or a start that depends on the rank.
    """
    if not parts.ranks.gives_up:
        raise ValueError(
            f"reprojection={parts.options.ranks.reprojection!r} gives no rank up for good, so there is "
            "nothing to shrink. Build the optimizer with reprojection='balanced' or 'none'"
        )
    sites = parts.sites.all
    peft_model = check(parts.known_model(model), sites)
    parts.preconditioning.to_plain_coordinates(parts.curvature)
    parts.ranks.settle(parts.curvature.buckets)
    kept, dropped = parts.ranks.by_name(), parts.ranks.dropped()
    if not any(kept.values()):
        raise ValueError(
            "no site keeps a direction, so nothing would be left to train; reduce the ranks less"
        )
    known = parts.pack_sites(with_operators=True)
    # PEFT keeps no trained bias without a pair.
    sizes = {site.name: max(kept[site.name], int(site.trains_bias)) for site in sites}
    gone = [site for site in sites if sizes[site.name] == 0]
    check_starts(sites, sizes, peft_model)
    narrow(parts.base, sites, sizes, peft_model)
    if peft_model is not None:
        update_configs(peft_model, gone)
    parts.ranks.remove({site.name: dropped[site.name] for site in gone})
    left = [site for site in sites if sizes[site.name] > 0]
    parts.attach(left, {site.name: narrowed(known[site.name], sizes[site.name]) for site in left})


def check(model: nn.Module | None, sites: Sequence[Site]) -> Any | None:
    """The PEFT model that holds the sites, or None for hand-written LoRA.

    Raises:
        ValueError: the PEFT model, which holds the configuration, is not known, or the adapter is DoRA.
    """
    adapters = sorted({site.adapter for site in sites if site.in_peft})
    if not adapters:
        return None
    if model is None:
        raise ValueError(
            "this optimizer no longer knows its model (it was copied or unpickled, or the model is gone); "
            "pass model="
        )
    peft_model = peft_model_in(model)
    for adapter in adapters:
        peft_config.check_exportable(peft_model.peft_config[adapter], adapter)
    return peft_model


def check_starts(sites: Iterable[Site], sizes: Mapping[str, int], peft_model: Any | None) -> None:
    """Refuse to cut adapters whose start depends on their rank.

    Raises:
        ValueError: a site of such an adapter would get another rank.
    """
    for adapter in sorted({site.adapter for site in sites if site.in_peft and sizes[site.name] != site.rank}):
        assert peft_model is not None
        peft_config.check_start(peft_model.peft_config[adapter], adapter)


def narrow(base: Optimizer, sites: Iterable[Site], sizes: Mapping[str, int], peft_model: Any | None) -> None:
    """Cut each site, and what the base keeps of it, to its leading directions.

    Args:
        base: the optimizer that holds the parameters. A site of rank 0 leaves its groups.
        sites: those to cut.
        sizes: name to the directions that are left.
        peft_model: which holds the layers, or None for hand-written LoRA.
    """
    layers = layers_of_pairs(peft_model) if peft_model is not None else {}
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
    for group in base.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in removed]
    if strange:
        warn(
            f"shrink_() does not know how to cut the state that {type(base).__name__} keeps "
            f"({', '.join(sorted(strange))}); it was reset for the LoRA parameters that became smaller. "
            "Training goes on, and the base gathers that state anew"
        )


def update_configs(peft_model: Any, gone: Sequence[Site]) -> None:
    """Write the layers' ranks into PEFT's configuration, and exclude the layers of ``gone``."""
    names = layers_of_pairs(peft_model.get_base_model())
    for adapter, config in peft_model.peft_config.items():
        layers = adapter_layers(peft_model, adapter)
        if not layers.pairs:
            continue
        ranks = {name: site.rank for name, site in layers.pairs.items()}
        new = peft_config.with_ranks(config, layers, ranks, fold_scale=False)
        left_out = [names[id(site.a_modules)][0] for site in gone if site.adapter == adapter and site.in_peft]
        if left_out:
            new.exclude_modules = peft_config.excluding(new.exclude_modules, left_out)
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "exclude_modules"):
            setattr(config, field, getattr(new, field))


def common_prefix(known: Mapping[str, str]) -> str:
    """What precedes the layer's name in a site's name: ``base_model.model.`` or nothing.

    Args:
        known: the layer's name in the base model to the site's name.
    """
    for layer, name in known.items():
        return name[: name.index(layer)]
    return ""


def layer_name(site_name: str, prefix: str, adapter: str) -> str:
    """The layer's name in the base model, from the site's name."""
    return site_name.removeprefix(prefix).removesuffix(f".{adapter}")
