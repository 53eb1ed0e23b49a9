"""Save the adapter that an optimizer trains."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn

from grit_optim.export import peft_config
from grit_optim.export.adapter import History, export_adapter
from grit_optim.export.shrink import common_prefix, layer_name
from grit_optim.lora.discovery import layers_of_pairs, peft_model_in
from grit_optim.messages import warn
from grit_optim.parts import Parts
from grit_optim.rank.report import RankReport


def save_trained(
    parts: Parts,
    path: str | PathLike[str],
    adapter: str | None,
    fold_scale: bool,
    dtype: torch.dtype | None,
    model: nn.Module | None,
) -> RankReport:
    """Save the adapter with the ranks that it keeps; see :meth:`GritOptimizer.save_adapter`."""
    model = parts.known_model(model)
    if model is None:
        raise ValueError(
            "this optimizer no longer knows its model (it was unpickled, or the model is gone); pass model="
        )
    peft_model = peft_model_in(model)
    trained = sorted({site.adapter for site in parts.sites.all})
    if adapter is None and len(trained) == 1:
        adapter = trained[0]
    adapter = peft_config.choose_adapter(peft_model, adapter)
    if adapter not in trained:
        raise ValueError(
            f"adapter {adapter!r} was trained elsewhere: this optimizer trains "
            f"{', '.join(map(repr, trained))}. Save it as it is with grit_optim.export_adapter(model, path, "
            f"adapter={adapter!r})"
        )
    return export_adapter(
        model,
        path,
        adapter=adapter,
        fold_scale=fold_scale,
        dtype=dtype,
        history=_history(parts, peft_model, adapter),
        threshold=parts.options.ranks.reported_threshold,
    )


def _history(parts: Parts, peft_model: Any, adapter: str) -> dict[str, History]:
    """What is known of each pair of ``adapter``, by the layer's name in the base model."""
    names = layers_of_pairs(peft_model.get_base_model())
    dropped, origin = parts.ranks.dropped(), parts.ranks.origin
    sites = [site for site in parts.sites.all if site.adapter == adapter and id(site.a_modules) in names]
    known = {names[id(site.a_modules)][0]: site.name for site in sites}
    prefix = common_prefix(known)
    known |= {layer_name(n, prefix, adapter): n for n in parts.ranks.removed if n.endswith(f".{adapter}")}
    return {
        layer: History(origin[name].rank, origin[name].parameters, dropped[name])
        for layer, name in known.items()
    }


def warn_of_ranks_that_stay(parts: Parts) -> None:
    """Warn before the run where ranks will be reduced of an adapter that cannot be saved at reduced ranks."""
    model = parts.sites.model
    if model is None or not parts.ranks.gives_up or not parts.options.ranks.adapts:
        return
    for adapter in sorted({site.adapter for site in parts.sites.all if site.in_peft}):
        try:
            config = peft_model_in(model).peft_config[adapter]
            peft_config.check_exportable(config, adapter)
            peft_config.check_start(config, adapter)
        except ValueError as error:
            warn(f"ranks will be given up in training, but save_adapter() and shrink_() will refuse: {error}")
