r"""Write PEFT's configuration of an adapter whose layers have ranks of their own.

PEFT matches the keys of ``rank_pattern`` and ``alpha_pattern`` as regular expressions, ``(.*\.)?(key)$`` from
the start. The first key that matches wins, and JSON sorts the keys. Every key here is therefore a layer's
whole name, escaped and anchored, so that a layer cannot take the rank of another whose name ends alike.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from grit_optim.lora.discovery import AdapterLayers
from grit_optim.lora.site import alpha_for
from grit_optim.messages import listed

# Starts that leave the base model's weights as they are. All others subtract from them a term that depends on
# the rank.
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def check_exportable(config: Any, adapter: str) -> None:
    """Refuse an adapter whose directions cannot be taken out one by one.

    Raises:
        ValueError: it is no LoRA, or DoRA.
    """
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind != "LORA":
        raise ValueError(
            f"adapter {adapter!r} is {kind}, not LORA; only LoRA adapters can be exported. Save it with "
            "model.save_pretrained(), or turn it into LoRA with peft.convert_to_lora"
        )
    if getattr(config, "use_dora", False):
        raise ValueError(
            f"adapter {adapter!r} uses DoRA, which divides by the norm of W + ΔW, so a smaller ΔW changes "
            "what every direction does and no loss can be predicted; save it whole with "
            "model.save_pretrained(), or train with use_dora=False"
        )


def check_start(config: Any, adapter: str) -> None:
    """Refuse another rank, or another program, for an adapter whose start changed the base model.

    Raises:
        ValueError: ``init_lora_weights`` is PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA or the like.
    """
    if config.init_lora_weights not in _HARMLESS_STARTS:
        raise ValueError(
            f"adapter {adapter!r} was started with init_lora_weights={config.init_lora_weights!r}, which "
            "takes a term of the full rank out of the base model's weights; PEFT does so again when it "
            "loads the adapter, but at another rank takes out another one, and other programs (fold_scale) "
            "take out none. Convert it first with "
            "model.save_pretrained(path_initial_model_for_weight_conversion=…), load that, and export it"
        )


def with_ranks(config: Any, layers: AdapterLayers, ranks: Mapping[str, int], fold_scale: bool) -> Any:
    """A copy of the configuration that gives each layer its own rank and the scale that it has now.

    Args:
        config: PEFT's ``LoraConfig``.
        layers: the adapter's layers.
        ranks: name in the base model to rank, for every pair; 0 leaves the layer out.
        fold_scale: the scale is multiplied into B and all ranks are one, for programs that know neither
            patterns nor rsLoRA; the configuration is to say that the scale is 1.

    Raises:
        ValueError: a rank changes, or the adapter is for other programs, and its start took a term out of the
            base model.
    """
    config = copy.deepcopy(config)
    rank_stabilized = bool(config.use_rslora) and not fold_scale
    sizes = {name: rank for name, rank in ranks.items() if rank > 0}
    alphas = {
        name: alpha_for(1.0 if fold_scale else layers.pairs[name].scaling, rank, rank_stabilized)
        for name, rank in sizes.items()
    }
    for name, layer in layers.others.items():
        adapter = _adapter_of(layers)
        name = _target_name(name, layer)
        sizes[name] = max(ranks.values()) if fold_scale else layer.r[adapter]
        alphas[name] = sizes[name] if fold_scale else layer.lora_alpha[adapter]
    config.r = max(sizes.values())
    at_full_rank = Counter(alphas[name] for name, rank in sizes.items() if rank == config.r)
    config.lora_alpha = at_full_rank.most_common(1)[0][0]
    config.rank_pattern = {anchored(name): rank for name, rank in sizes.items() if rank != config.r}
    config.alpha_pattern = {
        anchored(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha
    }
    if fold_scale:
        config.use_rslora = False
    left_out = [name for name, rank in ranks.items() if rank == 0]
    if left_out:
        config.exclude_modules = excluding(config.exclude_modules, left_out)
    if fold_scale or any(ranks[name] != pair.rank for name, pair in layers.pairs.items()):
        check_start(config, _adapter_of(layers))
        config.init_lora_weights = (
            True  # "orthogonal" refuses odd ranks, and loading overwrites what it draws
        )
        config.eva_config = None
    return config


def _adapter_of(layers: AdapterLayers) -> str:
    """The adapter's name."""
    return next(iter(layers.pairs.values())).adapter


def _target_name(name: str, layer: Any) -> str:
    """The name by which PEFT looks up a layer's rank; a parameter's for ``target_parameters`` (experts)."""
    parameter = getattr(layer, "parameter_name", None)
    if parameter is None:
        return name
    while name.endswith(".base_layer"):  # PEFT wraps a module once for each of its parameters
        name = name.removesuffix(".base_layer")
    return f"{name}.{parameter}"


def anchored(name: str) -> str:
    """A pattern that matches this layer's whole name and no other."""
    return f"^{re.escape(name)}$"


def excluding(before: str | Iterable[str] | None, names: Iterable[str]) -> str:
    """``exclude_modules`` with ``names`` added, as a regular expression, which PEFT matches in full."""
    exact = [re.escape(name) for name in names]
    if isinstance(before, str):
        exact.insert(0, f"(?:{before})")
    elif before:
        exact.insert(0, rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in sorted(before))})")
    return "|".join(exact)


def choose_adapter(peft_model: Any, adapter: str | None) -> str:
    """The adapter of that name, or the only one there is.

    Raises:
        ValueError: there is none of that name, or several and no name.
    """
    known: list[str] = list(peft_model.peft_config)
    if adapter is None and len(known) == 1:
        return known[0]
    if adapter is None or adapter not in known:
        what = "has several adapters" if adapter is None else f"has no adapter {adapter!r}"
        raise ValueError(
            f"the model {what}; pass adapter= one of: {listed([repr(name) for name in known], 20)}"
        )
    return adapter
