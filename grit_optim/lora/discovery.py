"""Finding the LoRA pairs of a model. The only module that knows how PEFT lays them out.

A *site* is one pair: ``A`` ``[r, d_in]`` (``lora_A.weight``) and ``B`` ``[d_out, r]`` (``lora_B.weight``),
which add ``s·B·A·x`` to a frozen layer. PEFT is recognised by the attributes of its layers, so that it need
not be imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Layers that hold ``lora_A`` but never call it as a module on activations, so that a hook on it would not
# fire.
_UNTAPPABLE_LAYERS = {
    "ParamWrapper": "PEFT reads the weights of `target_parameters` (MoE experts) directly",
    "MultiheadAttention": "PEFT merges the adapter of nn.MultiheadAttention into its weight",
    "LoraParallelLinear": "the rank of a tensor-parallel layer is split over processes",
}
# Variants whose forward pass is lora_B(lora_A(x)); any other may scale, mask or skip what lies between A and
# B.
_TAPPABLE_VARIANTS = {"DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant",
                      "ALoraLinearVariant"}  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# DataParallel's and DDP's prefix, and what torch.compile puts in front of each module that it was called on.
_WRAPPER_NAMES = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")


@dataclass(frozen=True, eq=False)
class Site:
    """One LoRA pair, looked up anew at each access, since PEFT may replace the modules that it holds.

    Attributes:
        name: the layer's name in the model and the adapter's, as in
            ``model.layers.0.self_attn.q_proj.default``; it keys the site's state in checkpoints.
        adapter: the key of the pair in the two mappings.
        a_modules: adapter name to the module whose weight is A; its output is h = A x.
        b_modules: adapter name to the module whose weight is B.
        scalings: adapter name to s.
        layer_bias: the bias of the layer that the pair is added to, where PEFT trains and saves it
            (``bias="lora_only"``).
    """

    name: str
    adapter: str
    a_modules: Mapping[str, nn.Module] | nn.ModuleDict
    b_modules: Mapping[str, nn.Module] | nn.ModuleDict
    scalings: Mapping[str, float]
    layer_bias: Tensor | None = None

    @property
    def tap(self) -> nn.Module:
        """The module whose output is h = A x, shape ``[..., r]`` (``[N, r, ...]`` if it is a convolution)."""
        return self.a_modules[self.adapter]

    @property
    def a(self) -> Tensor:
        """A, ``[r, d_in]`` (``[r, c_in, k, k]`` for a convolution)."""
        return self.a_modules[self.adapter].weight  # type: ignore[return-value]

    @property
    def b(self) -> Tensor:
        """B, ``[d_out, r]`` (``[d_out, r, 1, 1]`` for a convolution)."""
        return self.b_modules[self.adapter].weight  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.a.shape[0]

    @property
    def parameters(self) -> int:
        """Entries of A and B together."""
        return self.a.numel() + self.b.numel()

    @property
    def scaling(self) -> float:
        """S in ΔW = s·B·A."""
        return float(self.scalings[self.adapter])

    @property
    def channel_dim(self) -> int:
        """The dimension of h that has length r, counted from the end: a convolution's input may come without a batch."""
        return 1 - self.a.dim() if isinstance(self.tap, _CONVOLUTIONS) else -1

    @property
    def has_bias(self) -> bool:
        """Whether B adds a bias of its own (PEFT's ``lora_bias``), which is there whatever the rank."""
        return getattr(self.b_modules[self.adapter], "bias", None) is not None

    @property
    def trains_bias(self) -> bool:
        """Whether PEFT saves a bias with the pair, and drops it where the pair is left out."""
        return self.has_bias or self.layer_bias is not None

    @property
    def in_peft(self) -> bool:
        """Whether a PEFT layer holds the pair, rather than hand-written code."""
        return isinstance(self.a_modules, nn.ModuleDict)

    def narrow_(self, rank: int, layer: Any) -> None:
        """Keep the leading ``rank`` directions of A and B alone, with their gradients; ΔW's scaling s stays.

        The Parameter objects stay the same, so that whoever holds them need not be told. At rank 0 a PEFT
        layer loses the adapter, as if it had never been a target.

        Args:
            rank: how many directions stay.
            layer: PEFT's layer that holds the pair; None for hand-written LoRA. A site does not hold it
                itself: a copy of the optimizer would then copy the frozen weights too.
        """
        scaling = self.scaling
        if rank == 0 and layer is not None:
            for name in (*layer.adapter_layer_names, *layer.other_param_names):
                entries = getattr(layer, name)
                if self.adapter in entries:
                    del entries[self.adapter]
            return
        a_module, b_module = self.a_modules[self.adapter], self.b_modules[self.adapter]
        _narrow(self.a, 0, rank)
        _narrow(self.b, 1, rank)
        for module, names in (
            (a_module, ("out_features", "out_channels")),
            (b_module, ("in_features", "in_channels")),
        ):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, rank)
        if layer is not None:
            rs = layer.use_rslora.get(self.adapter, False)
            layer.r[self.adapter] = rank
            layer.lora_alpha[self.adapter] = alpha_for(scaling, rank, rs)

    def holds(self, a: Tensor, b: Tensor) -> bool:
        """Whether these are still the pair's weights; the adapter may have been replaced or deleted."""
        there = self.adapter in self.a_modules and self.adapter in self.b_modules
        return there and self.a is a and self.b is b

    @classmethod
    def from_modules(cls, name: str, a: nn.Module, b: nn.Module, scaling: float = 1.0) -> Site:
        """A site of hand-written LoRA: ``a`` maps x to h = A x, ``b`` maps h to B h, each with a ``weight``.

        Raises:
            ValueError: a weight is missing, or the ranks of the two do not agree.
        """
        for label, module in (("a", a), ("b", b)):
            if not isinstance(getattr(module, "weight", None), Tensor):
                raise ValueError(
                    f"site {name!r}: `{label}` is a {type(module).__name__} without a `weight` tensor; pass the module "
                    "(such as nn.Linear) whose weight is the LoRA matrix"
                )
        site = cls(name, "", {"": a}, {"": b}, {"": scaling})
        problem = _mismatch(site)
        if problem:
            raise ValueError(f"site {name!r}: {problem}; A must be [r, d_in] and B [d_out, r]")
        return site


def _narrow(parameter: Tensor, dim: int, size: int) -> None:
    """Cut ``parameter`` and its gradient to the first ``size`` entries of ``dim``, keeping the object."""
    gradient, kept = parameter.grad, parameter.detach().narrow(dim, 0, size).clone()
    parameter.grad = None
    # Autograd keeps the shape that it saw first for as long as an old graph is alive; a change of dtype makes
    # it look again.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = parameter.data.to(other)
    parameter.data = kept
    if gradient is not None:
        parameter.grad = gradient.narrow(dim, 0, size).clone()


def alpha_for(scaling: float, rank: int, rank_stabilized: bool) -> float:
    """The ``lora_alpha`` that gives ``scaling`` at ``rank``: s·r, or s·√r with rsLoRA; an int where it is a whole number."""
    alpha = scaling * (math.sqrt(rank) if rank_stabilized else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _mismatch(site: Site) -> str | None:
    """What makes the pair unusable as A ``[r, …]`` and B ``[d_out, r]``, or None."""
    a, b = site.a, site.b
    if a.numel() == 0 or b.numel() == 0:
        return "its weights are empty here (ZeRO-3 partitions them)"
    if getattr(site.b_modules[site.adapter], "groups", 1) != 1:
        return "B is a grouped convolution"
    if a.dim() < 2 or b.dim() < 2 or b.shape[1] != a.shape[0]:
        return f"A has shape {list(a.shape)} and B {list(b.shape)}"
    return None


def _reason_untapped(layer: nn.Module, site: Site, trained: set[int], tied: set[int]) -> str | None:
    """Why a LoRA pair that is trained cannot be tapped, or None."""
    kind = type(layer).__name__
    if kind in _UNTAPPABLE_LAYERS:
        return _UNTAPPABLE_LAYERS[kind]
    variant = getattr(layer, "lora_variant", {}).get(site.adapter)
    if variant is not None and type(variant).__name__ not in _TAPPABLE_VARIANTS:
        return f"{type(variant).__name__} changes what lies between A and B"
    if {m.untyped_storage().data_ptr() for m in (site.a, site.b)} & tied:
        return "it shares its matrices with the adapter of an embedding"
    if not (id(site.a) in trained and id(site.b) in trained):
        return f"only {'A' if id(site.a) in trained else 'B'} is trained"
    return _mismatch(site)


def _site_of(name: str, adapter: str, layer: Any, bias_saved: bool = False) -> Site:
    """The pair of one adapter in PEFT's layer of that name; a bias that is not trained, nor saved, is not held."""
    bias = getattr(getattr(layer, "base_layer", None), "bias", None)
    held = bias if bias is not None and (bias_saved or bias.requires_grad) else None
    return Site(f"{name}.{adapter}", adapter, layer.lora_A, layer.lora_B, layer.scaling, held)


def _embedding_storages(model: nn.Module) -> set[int]:
    """Where the matrices of embeddings' adapters lie in memory."""
    kinds = ("lora_embedding_A", "lora_embedding_B")
    entries = (p for module in model.modules() for kind in kinds for p in getattr(module, kind, {}).values())
    return {place for p in entries if (place := p.untyped_storage().data_ptr())}  # 0 on the meta device


def _is_trained(module: nn.Module, trained: set[int]) -> bool:
    return any(id(p) in trained for p in module.parameters())


def find_sites(
    model: nn.Module, parameters: Iterable[Tensor], frozen_too: bool = False
) -> tuple[list[Site], dict[str, str]]:
    """The LoRA pairs of ``model`` that an optimizer over ``parameters`` trains.

    Args:
        model: a PEFT model, or any module that contains PEFT's LoRA layers.
        parameters: the base optimizer's parameters; a pair of which neither matrix is among them is left
            alone.
        frozen_too: take parameters that require no gradient now for trained as well.

    Returns:
        The sites that can be tapped, and for the trained layers that cannot, name to reason.
    """
    trained = {id(p) for p in parameters if p.requires_grad or frozen_too}
    tied = _embedding_storages(model)
    sites: list[Site] = []
    untapped: dict[str, str] = {}
    for full_name, layer in model.named_modules():
        name = _WRAPPER_NAMES.sub("", full_name)
        if any(id(p) in trained for p in getattr(layer, "lora_embedding_A", {}).values()):
            untapped[name] = "an embedding's adapter is looked up, not multiplied"
        a_modules, b_modules = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if isinstance(a_modules, nn.ParameterDict) and any(id(p) in trained for p in a_modules.values()):
            untapped[name] = "AdaLoRA applies its own rank mask between A and B"
        if not (isinstance(a_modules, nn.ModuleDict) and isinstance(b_modules, nn.ModuleDict)):
            continue
        for adapter in a_modules:
            if not (_is_trained(a_modules[adapter], trained) or _is_trained(b_modules[adapter], trained)):
                continue
            site = _site_of(name, adapter, layer)
            reason = _reason_untapped(layer, site, trained, tied)
            if reason is None:
                sites.append(site)
            else:
                untapped[site.name] = reason
    return sites, untapped


def frozen_pairs(model: nn.Module, parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of the pairs that an optimizer over ``parameters`` holds, and that do not both require gradients now."""
    held = {id(p) for p in parameters}
    pairs = [
        (a_module.weight, layer.lora_B[adapter].weight)
        for _, layer in layers_of_pairs(model).values()
        for adapter, a_module in layer.lora_A.items()
    ]
    return [(a, b) for a, b in pairs if {id(a), id(b)} <= held and not (a.requires_grad and b.requires_grad)]


def peft_model_in(model: nn.Module) -> Any:
    """The ``PeftModel`` that ``model`` is, or that a wrapper (DDP, ``torch.compile``) holds.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if (
            hasattr(module, "peft_config")
            and hasattr(module, "base_model")
            and hasattr(module, "get_base_model")
        ):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no PeftModel, so there is no PEFT adapter to save; make one with "
        "peft.get_peft_model(model, config). Hand-written LoRA is saved with the model's own state_dict(), physically smaller "
        "after shrink_()"
    )


def layers_of_pairs(model: nn.Module) -> dict[int, tuple[str, Any]]:
    """``id(site.a_modules)`` of every PEFT layer with pairs, to the layer's name in ``model`` and the layer."""
    found = ((_WRAPPER_NAMES.sub("", name), layer) for name, layer in model.named_modules())
    return {
        id(layer.lora_A): (name, layer)
        for name, layer in found
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    }


@dataclass(frozen=True)
class AdapterLayers:
    """The layers that one adapter of a PEFT model has.

    Attributes:
        pairs: name in the base model to the pair, for plain pairs of A and B.
        others: name in the base model to the layer, for all other LoRA layers (embeddings, MoE experts,
            variants).
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
        name = _WRAPPER_NAMES.sub("", full_name)
        if adapter not in getattr(layer, "r", ()) or not isinstance(getattr(layer, "lora_alpha", None), dict):
            continue
        a_modules, b_modules = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if (
            isinstance(a_modules, nn.ModuleDict)
            and isinstance(b_modules, nn.ModuleDict)
            and adapter in a_modules
        ):
            site = _site_of(name, adapter, layer, bias_saved)
            if _reason_untapped(layer, site, {id(site.a), id(site.b)}, tied) is None:
                pairs[name] = site
                continue
        others[name] = layer
    return AdapterLayers(pairs, others)


def no_sites_message(model: nn.Module, untapped: Mapping[str, str]) -> str:
    """What to tell a user whose model has no LoRA pair that can be tapped."""
    found = "; ".join(f"{name}: {reason}" for name, reason in list(untapped.items())[:5])
    return (
        f"found no LoRA pair in {type(model).__name__} that both requires gradients and is among the base optimizer's "
        f"parameters{f' (seen but not usable: {found})' if found else ''}. Wrap the model first, as in "
        "`model = peft.get_peft_model(model, peft.LoraConfig(target_modules='all-linear'))`, give the base optimizer its "
        "trainable parameters, or pass hand-written pairs as `sites=[Site.from_modules(name, a, b, scaling), ...]`"
    )
