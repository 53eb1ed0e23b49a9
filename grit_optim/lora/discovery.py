"""Finding the LoRA pairs of a model. This module knows how PEFT lays them out.

PEFT's layers are recognised by their attributes, so that PEFT need not be imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from grit_optim.lora.names import plain_name
from grit_optim.lora.site import Site, alpha_for, mismatch
from grit_optim.messages import listed
from grit_optim.processes import shards

# Layers whose ``lora_A`` and ``lora_B`` are no pair of one rank.
_UNUSABLE_LAYERS = {
    "LoraParallelLinear": "the rank of a tensor-parallel layer is split over processes",
}
# Layers that hold ``lora_A`` but never call it as a module on activations: a hook on it would not fire.
_UNTAPPABLE_LAYERS = {
    "ParamWrapper": "PEFT reads the weights of `target_parameters` (MoE experts) directly",
    "MultiheadAttention": "PEFT merges the adapter of nn.MultiheadAttention into its weight",
}
_EMBEDDING = "an embedding's adapter is looked up, not multiplied"
_ADALORA = "AdaLoRA applies its own rank mask between A and B"
# Variants whose forward pass is lora_B(lora_A(x)). Others may scale, mask or skip values between A and B.
_TAPPABLE_VARIANTS = {"DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant",
                      "ALoraLinearVariant"}  # fmt: skip


def _reason_untapped(layer: nn.Module, adapter: str) -> str | None:
    """Why no module's output is h = A x in this layer; None if there is one."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and type(variant).__name__ not in _TAPPABLE_VARIANTS:
        return f"{type(variant).__name__} changes what lies between A and B"
    return _UNTAPPABLE_LAYERS.get(type(layer).__name__)


def _reason_unusable(layer: nn.Module, site: Site, trained: set[int], tied: set[int]) -> str | None:
    """Why a trained LoRA pair is no site; None if it is one."""
    kind = type(layer).__name__
    if kind in _UNUSABLE_LAYERS:
        return _UNUSABLE_LAYERS[kind]
    if site.untapped != _EMBEDDING and {shards.address(site.a), shards.address(site.b)} & tied:
        return "it shares its matrices with the adapter of an embedding"
    if not (id(site.a) in trained and id(site.b) in trained):
        return f"only {'A' if id(site.a) in trained else 'B'} is trained"
    return mismatch(site)


def _site_of(name: str, adapter: str, layer: Any, bias_saved: bool = False) -> Site:
    """The site of one adapter in a PEFT layer.

    Args:
        name: the layer's name in the model.
        adapter: the adapter's name.
        layer: the layer.
        bias_saved: whether PEFT saves the layer's bias with the adapter. A bias that is neither saved nor
            trained is not part of the site.
    """
    bias = getattr(getattr(layer, "base_layer", None), "bias", None)
    held = bias if bias is not None and (bias_saved or bias.requires_grad) else None
    reason = _reason_untapped(layer, adapter)
    return Site(f"{name}.{adapter}", adapter, layer.lora_A, layer.lora_B, layer.scaling, held, reason)


def _sites_of(name: str, layer: Any) -> list[Site]:
    """All pairs of a module that is a layer of PEFT's; none of any other."""
    of_a: Any = getattr(layer, "lora_A", None)
    found = [_site_of(name, adapter, layer) for adapter in of_a] if isinstance(of_a, nn.ModuleDict) else []
    if type(layer).__name__ == "ParamWrapper" and (n := layer.num_experts) > 1:
        found = [replace(s, name=f"{s.name}.{e}", experts=n, expert=e) for s in found for e in range(n)]
    for kind, reason in (("lora", _ADALORA), ("lora_embedding", _EMBEDDING)):
        a, b = (getattr(layer, f"{kind}_{side}", None) for side in "AB")
        if isinstance(a, nn.ParameterDict) and isinstance(b, nn.ParameterDict):
            pairs: tuple[Any, Any] = (a, b)
            found += [Site(f"{name}.{one}", one, *pairs, layer.scaling, untapped=reason) for one in a]
    return found


def _embedding_storages(model: nn.Module) -> set[int]:
    """Addresses of the matrices that belong to adapters of embeddings."""
    kinds = ("lora_embedding_A", "lora_embedding_B")
    entries = (p for module in model.modules() for kind in kinds for p in getattr(module, kind, {}).values())
    return {place for p in entries if (place := shards.address(p))}  # 0 on the meta device


def _is_trained(entry: nn.Module | Tensor, trained: set[int]) -> bool:
    parameters = [entry] if isinstance(entry, Tensor) else entry.parameters()
    return any(id(p) in trained for p in parameters)


def find_sites(
    model: nn.Module, parameters: Iterable[Tensor], frozen_too: bool = False
) -> tuple[list[Site], dict[str, str]]:
    """The LoRA pairs of ``model`` that an optimizer over ``parameters`` trains.

    Args:
        model: a PEFT model, or any module that contains PEFT's LoRA layers.
        parameters: the base optimizer's parameters. A pair with neither matrix among them is left alone.
        frozen_too: take parameters that require no gradient now for trained as well.

    Returns:
        The sites, in the model's order, and the trained adapters that are none, name to reason. Some sites
        cannot be tapped; they say why.
    """
    trained = {id(p) for p in parameters if p.requires_grad or frozen_too}
    tied = _embedding_storages(model)
    sites: list[Site] = []
    unusable: dict[str, str] = {}
    for full_name, layer in model.named_modules():
        name = plain_name(full_name)
        for site in _sites_of(name, layer):
            entries = (site.a_modules[site.adapter], site.b_modules[site.adapter])
            if not any(_is_trained(entry, trained) for entry in entries):
                continue
            reason = _reason_unusable(layer, site, trained, tied)
            if reason is None:
                sites.append(site)
            else:
                unusable[site.name] = reason
    uses = Counter((id(matrix), site.expert) for site in sites for matrix in (site.a, site.b))
    shared = [site for site in sites if any(uses[id(matrix), site.expert] > 1 for matrix in (site.a, site.b))]
    unusable |= {site.name: "it shares its matrices with another layer" for site in shared}
    return [site for site in sites if site not in shared], unusable


def frozen_pairs(model: nn.Module, parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each pair that is wholly among ``parameters`` but does not wholly require gradients now."""
    held = {id(p) for p in parameters}
    pairs = [
        (a_module.weight, layer.lora_B[adapter].weight)
        for _, layer in layers_of_pairs(model).values()
        for adapter, a_module in layer.lora_A.items()
    ]
    return [(a, b) for a, b in pairs if {id(a), id(b)} <= held and not (a.requires_grad and b.requires_grad)]


def pairs_elsewhere(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Parameters of ``groups`` that are none of the model's, and may be A and B of pairs by their shapes.

    Args:
        model: the model.
        groups: the base optimizer's parameter groups.

    Returns:
        ``id(parameter)`` to a name, for each A ``[r, d_in]`` for whose r there is a B ``[d_out, r]``, and
        each such B.
    """
    outside = {id(p): (name, p) for name, p in _outside(model, groups) if p.dim() > 1}
    of_a = {i: p.shape[0] for i, (_, p) in outside.items() if p.shape[0] < p.shape[1:].numel()}
    of_b = {i: p.shape[1] for i, (_, p) in outside.items() if p.shape[1] < p.shape[0]}
    both = set(of_a.values()) & set(of_b.values())
    return {i: name for i, (name, _) in outside.items() if {of_a.get(i), of_b.get(i)} & both}


def _outside(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    """Names and parameters of ``groups`` that are none of the model's. Without a name, place and shape."""
    inside = {id(p) for p in model.parameters()}
    found = []
    for i, group in enumerate(groups):
        for j, parameter in enumerate(group["params"]):
            if id(parameter) not in inside:
                shape = list(parameter.shape)
                place = f"param_groups[{i}]['params'][{j}] {shape}"
                names = group.get("param_names", ())  # shorter where somebody has appended to "params"
                found.append((names[j] if j < len(names) else place, parameter))
    return found


def peft_models_in(model: nn.Module) -> dict[str, Any]:
    """The outermost ``PeftModel``s that ``model`` is or holds, by their names in it.

    The names of wrappers (DDP, ``torch.compile``) are left out. ``model`` itself has the name ``""``.
    """
    found: dict[str, Any] = {}
    for full_name, module in model.named_modules():
        is_one = all(hasattr(module, name) for name in ("peft_config", "base_model", "get_base_model"))
        if is_one and not any(module is inner for outer in found.values() for inner in outer.modules()):
            found[plain_name(full_name)] = module
    return found


def peft_model_in(model: nn.Module) -> Any:
    """The ``PeftModel`` that ``model`` is, or that a wrapper (DDP, ``torch.compile``) holds.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = peft_models_in(model)
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} PeftModels ({listed(list(found))}), and an adapter "
            "is one model's. Pass one of them"
        )
    if found:
        return next(iter(found.values()))
    raise ValueError(no_peft_model_message(model))


def no_peft_model_message(model: nn.Module) -> str:
    """The error for a model whose pairs lie in no ``PeftModel``."""
    return (
        f"{type(model).__name__} holds no PeftModel, so there is no PEFT adapter to save. Make one with "
        "peft.get_peft_model(model, config). Save hand-written LoRA with the model's own state_dict(), "
        "which is smaller after shrink_()"
    )


def layers_of_pairs(model: nn.Module) -> dict[int, tuple[str, Any]]:
    """All PEFT layers with pairs: ``id(site.a_modules)`` to the layer's name in ``model`` and the layer."""
    found = ((plain_name(name), layer) for name, layer in model.named_modules())
    return {
        id(layer.lora_A): (name, layer)
        for name, layer in found
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    }


def resize_layer(layer: Any, adapter: str, rank: int) -> None:
    """Let a PEFT layer say that its pair has ``rank`` directions now; the scaling s stays.

    At rank 0 the layer loses the adapter, as if it had never been a target.
    """
    if rank == 0:
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            entries = getattr(layer, name)
            if adapter in entries:
                del entries[adapter]
        return
    layer.r[adapter] = rank
    layer.lora_alpha[adapter] = alpha_for(layer.scaling[adapter], rank, layer.use_rslora.get(adapter, False))


def largest_adapter(model: nn.Module | None) -> int:
    """Parameters of pairs of full rank on all frozen linear layers and convolutions; 0 without a model."""
    total = 0
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Linear):
            rows, columns = module.out_features, module.in_features
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            rows, columns = module.out_channels, module.weight.shape[1:].numel()
        else:
            continue
        total += 0 if module.weight.requires_grad else min(rows, columns) * (rows + columns)
    return total


def modules_of_pairs(sites: Iterable[Site], layers: Mapping[int, tuple[str, Any]]) -> list[nn.Module]:
    """Every module that knows the ranks of ``sites`` or holds their weights.

    Args:
        sites: the pairs.
        layers: PEFT's layers, from :func:`layers_of_pairs`.
    """
    found: dict[int, nn.Module] = {}
    for site in sites:
        holders = [site.a_modules[site.adapter], site.b_modules[site.adapter]]
        if site.in_peft:
            layer = layers[id(site.a_modules)][1]
            names = (*layer.adapter_layer_names, *layer.other_param_names)
            holders += [layer, *(getattr(layer, name) for name in names)]
        found.update({id(one): one for one in holders if isinstance(one, nn.Module)})
    return list(found.values())


@dataclass(frozen=True)
class AdapterLayers:
    """The layers of one adapter of a PEFT model, by their names in the base model.

    Attributes:
        pairs: name to site, for plain pairs of A and B.
        others: name to layer, for all other LoRA layers (embeddings, MoE experts, variants).
    """

    pairs: dict[str, Site]
    others: dict[str, Any]


def adapter_layers(peft_model: Any, adapter: str) -> AdapterLayers:
    """All layers of one adapter, whether they are trained or not."""
    pairs: dict[str, Site] = {}
    others: dict[str, Any] = {}
    tied = _embedding_storages(peft_model)
    bias_saved = getattr(peft_model.peft_config[adapter], "bias", "none") != "none"
    for full_name, layer in peft_model.get_base_model().named_modules():
        name = plain_name(full_name)
        if adapter not in getattr(layer, "r", ()) or not isinstance(getattr(layer, "lora_alpha", None), dict):
            continue
        a_modules, b_modules = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if (
            isinstance(a_modules, nn.ModuleDict)
            and isinstance(b_modules, nn.ModuleDict)
            and adapter in a_modules
        ):
            site = _site_of(name, adapter, layer, bias_saved)
            reason = _reason_unusable(layer, site, {id(site.a), id(site.b)}, tied)
            if reason is None and site.untapped is None:
                pairs[name] = site
                continue
        others[name] = layer
    return AdapterLayers(pairs, others)


def no_sites_message(
    model: nn.Module, untapped: Mapping[str, str], groups: Sequence[Mapping[str, Any]]
) -> str:
    """The error for a model and a base optimizer that share no LoRA pair.

    Args:
        model: the model.
        untapped: the trained adapters that cannot be tapped, name to reason.
        groups: the base optimizer's parameter groups.
    """
    kind = type(model).__name__
    seen = "; ".join(f"{name}: {reason}" for name, reason in list(untapped.items())[:5])
    said = [
        f"found no LoRA pair in {kind} that is among the base optimizer's parameters"
        f"{f' (seen but not usable: {seen})' if seen else ''}"
    ]
    held, outside = sum(len(group["params"]) for group in groups), _outside(model, groups)
    if outside:
        names = listed([name for name, _ in outside], 3)
        said.append(f"{len(outside)} of the base's {held} parameters are none of {kind}'s ({names})")
    pairs = [f"{name}.{a}" for name, layer in layers_of_pairs(model).values() for a in layer.lora_A]
    if any(hasattr(module, "vera_lambda_b") for module in model.modules()):
        said.append("VeRA trains no pair of its own: its A and B are frozen, and shared by all layers")
    elif pairs:
        said.append(
            f"{kind} has {len(pairs)} pairs ({listed(pairs, 3)}), and the base does not hold both A and B of "
            "any that can be tapped. Build the base on the parameters of this model, or pass the model whose "
            "parameters it holds (several in one nn.ModuleList)"
        )
    else:
        said.append(
            "Wrap the model first, as in `model = peft.get_peft_model(model, "
            "peft.LoraConfig(target_modules='all-linear'))`, and give the base optimizer its trainable "
            "parameters"
        )
    said.append("Pass hand-written pairs as `sites=[Site.from_modules(name, a, b, scaling), ...]`")
    return ". ".join(said)
