"""Pairs and parameters by modality: what overrides the model's structure, and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from grit_optim.lora.modality import check_modality, find_modalities
from grit_optim.lora.names import plain_name
from grit_optim.lora.site import Site
from grit_optim.messages import listed, nearest
from grit_optim.options.declared import MODALITIES

ModalityOf = Callable[[str], "str | None"] | Mapping[str, str]
"""What overrides the structure: a function of a layer's name, or parts of names to modalities."""


def finder(model: nn.Module, override: ModalityOf | None = None) -> Callable[[str], str | None]:
    """A function from a module's name in ``model`` to its modality; None in models that are not multimodal.

    Args:
        model: the model.
        override: what counts before the structure. A function may return None where it says nothing. Of
            parts of names, such as ``"vision_tower"`` or ``"mlp1.0"``, the longest that a name has decides.

    Raises:
        TypeError: ``override`` is neither a function nor a mapping.
        ValueError: a modality that is none, or a part of a name that no module of ``model`` has.
    """
    found = find_modalities(model)
    if override is None:
        return found.of
    said = override if callable(override) else _by_part(model, override)

    def of(name: str) -> str | None:
        """The modality that the override says, else the structure."""
        modality = said(name)
        if modality is not None:
            check_modality(f"modality_of, for {name!r},", modality)
        return found.of(name) if modality is None else modality

    return of


def _by_part(model: nn.Module, parts: object) -> Callable[[str], str | None]:
    if not isinstance(parts, Mapping):
        raise TypeError(
            "modality_of must be a function from a layer's name to its modality, or a mapping such as "
            f"{{'vision_tower': 'vision'}}, got {type(parts).__name__}"
        )
    names = [f".{plain_name(name)}." for name, _ in model.named_modules()]
    for part in parts:
        if not any(f".{part}." in name for name in names):
            close = nearest(part, {piece for name in names for piece in name.split(".") if piece})
            hint = f"; did you mean {close!r}?" if close else ""
            raise ValueError(
                f"modality_of names {part!r}, and no module of {type(model).__name__} is called so{hint}"
            )

    def of(name: str) -> str | None:
        """What the longest part that the name has says."""
        there = [part for part in parts if f".{part}." in f".{name}."]
        return parts[max(there, key=len)] if there else None

    return of


def with_modality(sites: Sequence[Site], model: nn.Module, override: ModalityOf | None) -> list[Site]:
    """The sites, each with its modality in ``model``; those that know it already keep it.

    A hand-written site is found by the module that multiplies by A.

    Args:
        sites: the pairs.
        model: the model that they lie in.
        override: see :func:`finder`.
    """
    of = finder(model, override)
    by_hand = any(isinstance(site.a_modules, dict) for site in sites)
    named = [*model.named_modules(), *model.named_parameters()] if by_hand else []
    places = {id(thing): plain_name(name) for name, thing in named}
    found = []
    for site in sites:
        a = site.a_modules[site.adapter] if isinstance(site.a_modules, dict) else None
        modality = site.modality or of(places.get(id(a), site.name))
        found.append(site if modality == site.modality else replace(site, modality=modality))
    return found


def modality_groups(
    model: nn.Module,
    *,
    vision: Mapping[str, Any] | None = None,
    audio: Mapping[str, Any] | None = None,
    cross_modal: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    modality_of: ModalityOf | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups by modality, for any optimizer: a learning rate, or another setting, for each part.

    Args:
        model: the model, with its adapter.
        vision: settings of the vision encoder's parameters, such as ``{"lr": 1e-5}``.
        audio: those of the audio encoder's.
        cross_modal: those of projectors, mergers, resamplers and cross-attention.
        text: those of the language model's, and of all others.
        modality_of: what overrides the structure, as in :class:`GritOptimizer`.

    Returns:
        A group for each part that has trainable parameters, with ``"params"``, ``"modality"`` and the
        settings. Parts without settings have the optimizer's defaults.

    Raises:
        TypeError: settings that are no mapping.
        ValueError: nothing to train in a part that settings are given for, or no such part.

    Example:
        >>> groups = modality_groups(model, vision={"lr": 1e-5}, text={"lr": 2e-4})  # doctest: +SKIP
        >>> optimizer = GritOptimizer(torch.optim.AdamW(groups, lr=1e-4), model)  # doctest: +SKIP
    """
    given = {"vision": vision, "audio": audio, "cross_modal": cross_modal, "text": text}
    for name, settings in given.items():
        if settings is not None and (not isinstance(settings, Mapping) or "params" in settings):
            raise TypeError(
                f"{name} must be settings of a parameter group, as in {name}={{'lr': 1e-5}}, got {settings!r}"
            )
    of = finder(model, modality_of)
    groups: dict[str, list[Any]] = {name: [] for name in MODALITIES}
    parts = set()
    for name, parameter in model.named_parameters():
        parts.add(modality := of(plain_name(name)))
        if parameter.requires_grad:
            groups[modality or "text"].append(parameter)
    for name, settings in given.items():
        if settings is not None and not groups[name]:
            raise ValueError(missing_part(model, name, parts))
    found = [(name, params) for name, params in groups.items() if params]
    return [{"params": params, "modality": name, **(given[name] or {})} for name, params in found]


def missing_part(model: nn.Module | None, name: str, parts: Collection[str | None]) -> str:
    """The error where something is said of a part that has nothing to train.

    Args:
        model: the model.
        name: the modality.
        parts: the modalities that the model has.
    """
    kind = type(model).__name__
    if name in parts:
        return (
            f"the {name} part of {kind} has nothing to train. Let the adapter reach it "
            "(LoraConfig(target_modules=...)), or leave its settings out"
        )
    has = f"its parts are {listed(sorted(filter(None, parts)))}" if any(parts) else "it is not multimodal"
    return (
        f"found no {name} part in {kind}: by its configuration {has}. Say which modules belong to it with "
        f"modality_of={{'part.of.a.name': {name!r}}}"
    )
