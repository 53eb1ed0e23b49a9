"""Save the adapter that an optimizer trains."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from grit_optim.export import peft_config
from grit_optim.export.adapter import History, prepared, write
from grit_optim.export.peft_models import Home, homes
from grit_optim.lora.discovery import no_peft_model_message, peft_models_in
from grit_optim.messages import warn
from grit_optim.parts import Parts
from grit_optim.rank.report import RankReport, known


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
        raise ValueError("this optimizer no longer knows its model (it was unpickled); pass model=")
    found = _chosen(model, parts, adapter)
    threshold = parts.options.ranks.reported_threshold
    ready, sites = [], []
    for home, name in found:
        past = _history(parts, home, name)
        ready.append(
            prepared(
                home.peft_model,
                adapter=name,
                fold_scale=fold_scale,
                dtype=dtype,
                history=past,
                threshold=threshold,
            )
        )
        prefix = _prefix(home, name)
        sites += [replace(s, name=f"{prefix}{s.name}.{name}") for s in ready[-1].report.sites]
    if parts.processes.writes:
        for (home, _), one in zip(found, ready, strict=True):  # all of them can be saved
            write(Path(path) / home.name, one)
    return RankReport(sites, threshold)


def _chosen(model: nn.Module, parts: Parts, adapter: str | None) -> list[tuple[Home, str]]:
    """The PeftModels whose adapter is to be saved, each with the adapter's name.

    Raises:
        ValueError: no such adapter, one that is not trained here, several without a name, or nothing is
            trained yet.
    """
    found = homes(model, parts.sites.present())
    if not found and not peft_models_in(model):
        raise ValueError(no_peft_model_message(model))
    if not found:
        raise ValueError(
            "this optimizer works on no pair of a PEFT adapter now, so there is nothing trained to save. "
            "Save what is there with grit_optim.export_adapter(model, path)"
        )
    if adapter is not None:
        found = [home for home in found if adapter in home.adapters()] or found
    chosen = []
    for home in found:
        trained = home.adapters()
        only = trained[0] if adapter is None and len(trained) == 1 else adapter
        name = peft_config.choose_adapter(home.peft_model, only)
        if name not in trained:
            raise ValueError(
                f"adapter {name!r} was trained elsewhere: this optimizer trains "
                f"{', '.join(map(repr, trained))}. Save it as it is with grit_optim.export_adapter(model, "
                f"path, adapter={name!r})"
            )
        chosen.append((home, name))
    return chosen


def _prefix(home: Home, adapter: str) -> str:
    """What precedes the layer's name in the base model in the name of a site of ``adapter``."""
    names = home.layer_names()
    first = next(site for site in home.sites if site.adapter == adapter)
    return first.name.removesuffix(f"{names[id(first.a_modules)]}.{adapter}")


def _history(parts: Parts, home: Home, adapter: str) -> dict[str, History]:
    """What is known of each pair of ``adapter``, by the layer's name in the base model."""
    dropped, origin, prefix = parts.ranks.dropped(), parts.ranks.origin, _prefix(home, adapter)
    names = [site.name for site in home.sites if site.adapter == adapter]
    names += [n for n in parts.ranks.removed if n.startswith(prefix) and n.endswith(f".{adapter}")]
    return {
        name.removeprefix(prefix).removesuffix(f".{adapter}"): History(
            origin[name].rank, origin[name].parameters, known(dropped[name]), origin[name].modality
        )
        for name in names
    }


def warn_of_ranks_that_stay(parts: Parts) -> None:
    """Warn before the run where ranks will be reduced of an adapter that cannot be saved at reduced ranks."""
    model = parts.sites.model
    if model is None or not parts.ranks.gives_up or not parts.options.ranks.adapts:
        return
    try:
        found = homes(model, parts.sites.all)
    except ValueError as error:
        _warn_of_refusal(error)
        return
    for home in found:
        for adapter in home.adapters():
            config = home.peft_model.peft_config[adapter]
            try:
                peft_config.check_exportable(config, adapter)
                peft_config.check_start(config, adapter)
            except ValueError as error:
                _warn_of_refusal(error)


def _warn_of_refusal(error: ValueError) -> None:
    warn(f"ranks will be given up in training, but save_adapter() and shrink_() will refuse: {error}")
