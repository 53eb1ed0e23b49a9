"""Which modality each part of a multimodal model belongs to, found from how the model is built.

transformers' models carry their configurations. The module that has the vision configuration of a model is
its vision encoder, and likewise for audio. The module that has the text configuration is the language model.
What lies between is cross-modal: projectors, connectors, resamplers; the mergers behind the blocks of an
encoder, and the cross-attention of a language model too. The rest is text.

Configurations are recognised by their attributes, so that transformers need not be imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from grit_optim.lora.names import plain_name
from grit_optim.messages import listed, nearest
from grit_optim.options.declared import MODALITIES

VISION, AUDIO, CROSS_MODAL, TEXT = MODALITIES

# What only the configuration of an encoder of pictures, or of sound, has; then parts of its name in the
# configuration of the whole.
_FIELDS = {VISION: ("image_size", "patch_size"), AUDIO: ("num_mel_bins", "input_feat_size")}
_WORDS = {VISION: ("vision", "visual", "image", "video"), AUDIO: ("audio", "speech")}
_INPUTS = {"pixel_values": VISION, "pixel_values_videos": VISION, "input_features": AUDIO}
# What leads out of an encoder, beside its blocks, where widths do not tell.
_BRIDGE = re.compile(r"merge|project|connect|resampl|perceiver|qformer|adapt|align|abstract", re.IGNORECASE)
_CROSS_ATTENTION = re.compile(r"cross_?att|encoder_att|xatt", re.IGNORECASE)
_Modules = Mapping[str, nn.Module]


@dataclass
class Modalities:
    """The modality of each part of a model.

    Attributes:
        places: names of modules to their modality. A layer has that of the innermost one that it lies in.
        readers: names of the language models whose cross-attention reads another modality.
        texts: the text configurations, by the name of the whole multimodal model.
    """

    places: dict[str, str] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    texts: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> str | None:
        """The modality of the layer ``name``; None where it lies in no multimodal model."""
        around = [place for place in self.places if _within(name, place)]
        modality = self.places[max(around, key=len)] if around else None
        crosses = any(
            _within(name, place) and _CROSS_ATTENTION.search(name[len(place) :]) for place in self.readers
        )
        return CROSS_MODAL if modality == TEXT and crosses else modality

    @property
    def encoded(self) -> list[str]:
        """The modalities that encoders bring in."""
        return [modality for modality in (VISION, AUDIO) if modality in self.places.values()]


def find_modalities(model: nn.Module) -> Modalities:
    """The modalities of the parts of ``model``, which may be a multimodal model or hold some."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    encoders = _encoders(modules)
    found = Modalities()
    for whole, module in modules.items() if encoders else ():
        text, inside = _text_config(module), {n: kind for n, kind in encoders.items() if _within(n, whole)}
        if text is not None and inside and not any(_within(whole, outer) for outer in found.texts):
            found.texts[whole] = text
            _add(found, {n: m for n, m in modules.items() if _within(n, whole)}, whole, inside)
    return found


def check_modality(where: str, modality: object) -> None:
    """Refuse what is no modality.

    Args:
        where: who says it, for the message.
        modality: what is said.

    Raises:
        ValueError: it is none of :data:`MODALITIES`.
    """
    if modality not in MODALITIES:
        close = nearest(modality, MODALITIES)
        hint = f"; did you mean {close!r}?" if close else ""
        raise ValueError(f"{where} says {modality!r}, which is none of {listed(MODALITIES)}{hint}")


def _add(found: Modalities, modules: _Modules, whole: str, encoders: Mapping[str, str]) -> None:
    """Add the parts of the multimodal model named ``whole``."""
    text, places = found.texts[whole], found.places
    places[whole] = TEXT
    model = _language_model(modules, whole, text, encoders)
    if model is not None:
        common = _common(*encoders, model)
        outside = {n: m for n, m in modules.items() if not any(_within(n, encoder) for encoder in encoders)}
        places |= {common: CROSS_MODAL, model: TEXT, **_vocabulary(outside)}
    else:  # the decoder's blocks lie in the whole itself
        blocks = _blocks(modules, encoders)
        places |= {_aside(encoder, blocks): CROSS_MODAL for encoder in encoders}
    if not getattr(text, "is_encoder_decoder", False):
        found.readers.append(whole if model is None else model)
    for name, kind in encoders.items():
        places |= {name: kind, **dict.fromkeys(_bridges(modules, name, text), CROSS_MODAL)}


def _within(name: str, place: str) -> bool:
    """Whether the module ``name`` is the one named ``place`` or lies in it."""
    return not place or name == place or name.startswith(f"{place}.")


def _outermost(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in sorted(names, key=len):
        if not any(_within(name, outer) for outer in kept):
            kept.append(name)
    return kept


def _common(*names: str) -> str:
    """The innermost module that all the named ones lie in."""
    first, common = names[0].split("."), list[str]()
    for i, part in enumerate(first):
        if not all(_within(name, ".".join([*common, part])) for name in names[1:]) or i == len(first) - 1:
            break
        common.append(part)
    return ".".join(common)


def _aside(encoder: str, blocks: str) -> str:
    """The outermost module that holds an encoder, and not the decoder's blocks."""
    parts = encoder.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((place for place in around if not _within(blocks, place)), encoder)


def parts_of(config: Any) -> dict[str, Any]:
    """The configurations in a configuration, by name."""
    return {key: value for key, value in getattr(config, "__dict__", {}).items() if hasattr(value, "to_dict")}


def _kind(key: str, config: Any) -> str | None:
    """The modality that an encoder with this configuration reads; None if it is no encoder's."""
    for kind, names in _FIELDS.items():
        if any(name in config.__dict__ for name in names):
            return kind
    return next((kind for kind, words in _WORDS.items() if any(word in key for word in words)), None)


def _encoders(modules: _Modules) -> dict[str, str]:
    """Names of the outermost encoders of pictures or sound, to their modality."""
    configs = {name: c for name, m in modules.items() if (c := getattr(m, "config", None)) is not None}
    found: dict[str, str] = {}
    for whole, config in configs.items():
        for key, part in parts_of(config).items():
            if (kind := _kind(key, part)) is not None:
                found |= dict.fromkeys(_having(configs, whole, part), kind)
    above = {name: [c for n, c in configs.items() if name != n and _within(name, n)] for name in configs}
    for name, config in configs.items():  # code of one's own may not say it in the configuration
        read = _INPUTS.get(str(getattr(modules[name], "main_input_name", "")))
        if read is not None and above[name] and all(config is not other for other in above[name]):
            found.setdefault(name, read)
    return {name: found[name] for name in _outermost(found)}


def _having(configs: Mapping[str, Any], whole: str, part: Any) -> list[str]:
    """The outermost modules in ``whole`` that have this configuration, or one of its type if none has."""
    inside = {name: config for name, config in configs.items() if name != whole and _within(name, whole)}
    same = [name for name, config in inside.items() if config is part]
    return _outermost(same or [name for name, config in inside.items() if type(config) is type(part)])


def _text_config(module: nn.Module) -> Any:
    """The configuration of a model's language model, which may be its own; None if it has none."""
    config = getattr(module, "config", None)
    get = getattr(config, "get_text_config", None)
    text = config if get is None else get()
    return text if getattr(text, "vocab_size", None) else None


def _language_model(modules: _Modules, whole: str, text: Any, encoders: Mapping[str, str]) -> str | None:
    """The module with the text configuration; None where the whole itself has it."""
    if modules[whole].config is text:
        return None
    configs = {name: c for name, m in modules.items() if (c := getattr(m, "config", None)) is not None}
    outside = [n for n in _having(configs, whole, text) if not any(_within(n, e) for e in encoders)]
    return outside[0] if outside else None


def _vocabulary(modules: _Modules) -> dict[str, str]:
    """The models' own embeddings of tokens and output layers, which are text wherever they lie."""
    found = set()
    for module in modules.values():
        for method in ("get_input_embeddings", "get_output_embeddings"):
            with suppress(NotImplementedError, AttributeError):  # of models that have no tokens
                found.add(id(getattr(module, method)()))
    return {name: TEXT for name, module in modules.items() if id(module) in found}


def _blocks(modules: _Modules, encoders: Mapping[str, str]) -> str:
    """The list of a model's blocks outside ``encoders``: the longest, and of these the largest."""
    lists = {n: m for n, m in modules.items() if isinstance(m, nn.ModuleList)}
    sizes = {
        name: (len(blocks), sum(p.numel() for p in blocks.parameters()))
        for name, blocks in lists.items()
        if not any(_within(name, encoder) for encoder in encoders)
    }
    return max(sizes, key=lambda name: sizes[name], default="")


def _bridges(modules: _Modules, encoder: str, text: Any) -> list[str]:
    """The parts of an encoder that bring its output to the language model's width."""
    inside = {name: module for name, module in modules.items() if name != encoder and _within(name, encoder)}
    blocks = _blocks(inside, {})
    width, own = getattr(text, "hidden_size", None), getattr(modules[encoder].config, "hidden_size", None)
    found = []
    for child, module in modules[encoder].named_children():
        name = f"{encoder}.{child}"
        widths = {m.out_features for m in module.modules() if isinstance(m, nn.Linear)}
        named = _BRIDGE.search(child) or _BRIDGE.search(type(module).__name__)
        if not _within(blocks, name) and width in widths and (width != own or named):
            found.append(name)
    return found
