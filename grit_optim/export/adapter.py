"""Write a PEFT adapter whose tensors are as small as its ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_optim.export import atomic_folder, peft_config
from grit_optim.export.files import (
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_A,
    LORA_B,
    LORA_B_BIAS,
    PREFIX,
    STALE_WEIGHTS,
    WEIGHTS,
)
from grit_optim.linalg import full_precision
from grit_optim.lora.discovery import AdapterLayers, adapter_layers, peft_model_in
from grit_optim.lora.site import Site
from grit_optim.messages import listed
from grit_optim.processes import shards
from grit_optim.rank.report import FILE_NAME, RankReport, SiteRank, effective_ranks, product_singular_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that an adapter can be saved in: those that PEFT reads on every device."""


class History(NamedTuple):
    """What is known of a site beside its weights.

    Attributes:
        rank: directions at first.
        parameters: entries of A and B at first.
        predicted_loss: rise of the loss that the directions given up were predicted to cost; None if unknown.
        modality: of a site in a multimodal model; None if unknown.
    """

    rank: int
    parameters: int
    predicted_loss: float | None
    modality: str | None = None


class Pair(NamedTuple):
    """A ``[r, …]`` and B ``[d_out, r, …]`` as they are to be saved."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, site: Site) -> Pair:
        """All of both; where the processes share them out, each of them has to call it."""
        return cls(shards.whole(site.a).detach(), shards.whole(site.b).detach())

    def padded(self, rank: int) -> Pair:
        """The pair with zero directions added up to ``rank``; B·A stays the same."""
        a, b, more = self.a, self.b, rank - self.a.shape[0]
        return Pair(
            torch.cat((a, a.new_zeros(more, *a.shape[1:]))),
            torch.cat((b, b.new_zeros(b.shape[0], more, *b.shape[2:])), dim=1),
        )


@torch.no_grad()
@full_precision()
def export_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    adapter: str | None = None,
    fold_scale: bool = False,
    tolerance: float = 0.0,
    dtype: torch.dtype | None = None,
    history: Mapping[str, History] | None = None,
    threshold: float = 0.99,
) -> RankReport:
    """Save an adapter without the directions that it does not use, for ``PeftModel.from_pretrained``.

    Leaves out directions whose row of A or column of B is exactly zero, and layers that keep no direction.
    Does not change the model. ``path`` holds the old adapter or the new one at every moment, however the
    process ends.

    Args:
        model: the PEFT model, or a wrapper that holds it.
        path: the folder to write; other files in it stay.
        adapter: the adapter's name; needed where there are several.
        fold_scale: save an adapter that is right under every program's rule for the scale (llama.cpp, vLLM
            and others ignore ``rank_pattern``, ``alpha_pattern`` or rsLoRA; docs/adapters.md). The scale s is
            multiplied into B, every layer is padded with zeros to the largest rank r, and ``alpha = r``. The
            report counts the zeros.
        tolerance: share in [0, 1). Also leave out singular values of ΔW up to this share of the layer's
            largest. A layer with such values is written as the factors of its SVD. 0 changes no weight.
        dtype: ``torch.bfloat16`` or ``torch.float16`` rounds an adapter that was trained in fp32 to half the
            bytes. None saves it as it is. PEFT loads either as fp32, unless told otherwise.
        history: what is known of each layer's past, by its name in the base model;
            :meth:`GritOptimizer.save_adapter` passes it.
        threshold: τ in (0, 1] of the effective ranks in the report.

    Returns:
        The ranks, also saved as ``grit_ranks.json``.

    Raises:
        ValueError: the model has no PEFT adapter of that name, the adapter is not LoRA or is DoRA, its start
            changed the base weights, no direction is left, a weight is infinite or NaN, or ``dtype`` cannot
            hold a value.
    """
    found = prepared(
        peft_model_in(model),
        adapter=adapter,
        fold_scale=fold_scale,
        tolerance=tolerance,
        dtype=dtype,
        history=history,
        threshold=threshold,
    )
    write(Path(path), found)
    return found.report


class Prepared(NamedTuple):
    """An adapter as it is to be saved; nothing more can be refused.

    Attributes:
        peft_model: which it was trained in.
        tensors: by PEFT's names.
        config: PEFT's configuration.
        report: the ranks.
    """

    peft_model: Any
    tensors: dict[str, Tensor]
    config: Any
    report: RankReport


@torch.no_grad()
def prepared(
    peft_model: Any,
    *,
    adapter: str | None,
    fold_scale: bool,
    tolerance: float = 0.0,
    dtype: torch.dtype | None,
    history: Mapping[str, History] | None,
    threshold: float,
) -> Prepared:
    """What :func:`export_adapter` is to write, from a PeftModel and its other arguments.

    Raises:
        ValueError: as :func:`export_adapter`.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance must be a share of the largest singular value in [0, 1), got {tolerance!r}"
        )
    adapter = peft_config.choose_adapter(peft_model, adapter)
    config = peft_model.peft_config[adapter]
    peft_config.check_exportable(config, adapter)
    layers = adapter_layers(peft_model, adapter)
    whole = {name: Pair.of(site) for name, site in layers.pairs.items()}
    broken = [name for name, pair in whole.items() if not all(m.isfinite().all() for m in pair)]
    if broken:
        raise ValueError(
            f"adapter {adapter!r} has weights that are infinite or NaN in {len(broken)} layer(s) "
            f"({listed(broken, 3)}): the run has diverged. Go back to an earlier checkpoint, or save the "
            "adapter as it is with model.save_pretrained()"
        )
    smaller = {name: _reduced(site, whole[name], tolerance) for name, site in layers.pairs.items()}
    if not any(pair.a.shape[0] for pair in smaller.values()):
        raise ValueError(
            f"adapter {adapter!r} has no direction to save: in each of its {len(smaller)} layers "
            f"({listed(list(smaller), 3)}) A or B is zero. It has not been trained yet, or the rank budget "
            "left nothing. Train it first, or reduce the ranks less: PEFT cannot load an adapter of rank 0"
        )
    if fold_scale:
        smaller = _of_one_rank(smaller, layers, adapter)
    ranks = {name: pair.a.shape[0] for name, pair in smaller.items()}
    saved = peft_config.with_ranks(config, layers, ranks, fold_scale)
    report = _report(layers, smaller, history or {}, threshold)
    tensors = _tensors(peft_model, layers, smaller, fold_scale)
    return Prepared(peft_model, tensors if dtype is None else _rounded(tensors, dtype), saved, report)


def _of_one_rank(pairs: Mapping[str, Pair], layers: AdapterLayers, adapter: str) -> dict[str, Pair]:
    """The pairs, padded to the largest rank of any layer; those of rank 0 stay left out.

    llama.cpp divides alpha by the rank of each tensor, vLLM by the ``r`` of the configuration. Both give the
    same scale to all layers only where all ranks are one.
    """
    others = [layer.r[adapter] for layer in layers.others.values()]
    largest = max([*(pair.a.shape[0] for pair in pairs.values()), *others])
    return {name: pair.padded(largest) if pair.a.shape[0] else pair for name, pair in pairs.items()}


def _reduced(site: Site, pair: Pair, tolerance: float) -> Pair:
    """The pair without the directions that it does not use.

    A layer whose bias is trained keeps one: PEFT saves no bias without a pair.
    """
    a, b = pair
    used = (a.flatten(1) != 0).any(1) & (b.transpose(0, 1).flatten(1) != 0).any(1)
    if site.trains_bias and not used.any():
        used[0] = True
    kept = Pair(a[used], b[:, used])
    return _compressed(kept, tolerance) if tolerance > 0 and kept.a.shape[0] > 1 else kept


def _compressed(pair: Pair, tolerance: float) -> Pair:
    """The factors of the SVD of B·A without singular values up to ``tolerance`` times the largest.

    The pair itself where there are no such values.
    """
    rank = pair.a.shape[0]
    right, left = (torch.linalg.qr(m.double()) for m in (pair.a.flatten(1).mT, pair.b.flatten(1)))
    u, values, vh = torch.linalg.svd(left.R @ right.R.mT)
    count = int((values > tolerance * values[0]).sum())
    if count == rank:
        return pair
    root = values[:count].sqrt()
    a = root[:, None] * (vh[:count] @ right.Q.mT)
    b = (left.Q @ u[:, :count]) * root
    return Pair(a.to(pair.a).view(count, *pair.a.shape[1:]), b.to(pair.b).view(-1, count, *pair.b.shape[2:]))


def _tensors(
    peft_model: Any, layers: AdapterLayers, smaller: Mapping[str, Pair], fold_scale: bool
) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names, with the smaller pairs in place of the full ones."""
    from peft import get_peft_model_state_dict

    adapter = next(iter(layers.pairs.values())).adapter
    tensors = {
        key.replace("._orig_mod", ""): shards.whole(t)
        for key, t in get_peft_model_state_dict(peft_model, adapter_name=adapter).items()
    }
    for name, pair in smaller.items():
        place, site = f"{PREFIX}{name}", layers.pairs[name]
        if place + LORA_A not in tensors:
            raise ValueError(
                f"PEFT does not save layer {name!r} of adapter {adapter!r}; please report this with the "
                "model's name"
            )
        if pair.a.shape[0] == 0:
            del tensors[place + LORA_A], tensors[place + LORA_B]
            continue
        scale = site.scaling if fold_scale else 1.0
        tensors[place + LORA_A] = pair.a
        tensors[place + LORA_B] = pair.b if scale == 1 else pair.b * scale
        if scale != 1 and site.has_bias:
            tensors[place + LORA_B_BIAS] = tensors[place + LORA_B_BIAS] * scale
    if fold_scale:
        _fold_others(tensors, layers, adapter, max(pair.a.shape[0] for pair in smaller.values()))
    # Copies: a view would bring its whole storage along, and safetensors refuses tensors that share memory.
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def _rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in that type; integers and booleans stay as they are.

    Raises:
        ValueError: a value is finite and becomes infinite.
    """
    rounded = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()
    }
    lost = [
        key
        for key, t in rounded.items()
        if not torch.isfinite(t).all() and torch.isfinite(tensors[key]).all()
    ]
    if lost:
        raise ValueError(
            f"{dtype} cannot hold values of {listed(lost)} (at most {torch.finfo(dtype).max:g}); use "
            "torch.bfloat16 or None"
        )
    return rounded


def _fold_others(tensors: dict[str, Tensor], layers: AdapterLayers, adapter: str, rank: int) -> None:
    """Fold the scale of the adapted embeddings, which are no pairs here, and pad them to ``rank``.

    Raises:
        ValueError: another kind of layer, whose matrices are not known.
    """
    for name, layer in layers.others.items():
        place = f"{PREFIX}{name}"
        if not {place + EMBEDDING_A, place + EMBEDDING_B} <= tensors.keys():
            raise ValueError(
                f"fold_scale=True cannot fold the scale of layer {name!r} ({type(layer).__name__}); leave "
                "it at False"
            )
        pair = Pair(tensors[place + EMBEDDING_A], tensors[place + EMBEDDING_B] * layer.scaling[adapter])
        tensors[place + EMBEDDING_A], tensors[place + EMBEDDING_B] = pair.padded(rank)


def _report(
    layers: AdapterLayers, smaller: Mapping[str, Pair], history: Mapping[str, History], threshold: float
) -> RankReport:
    """What is saved of each layer, with the layers that are left out."""
    sites = []
    for name, site in layers.pairs.items():
        a, b = smaller[name]
        past = history.get(name, History(site.rank, site.parameters, None))
        spectrum = product_singular_values(a, b)[None] if a.shape[0] else a.new_zeros(1, 1)
        entropy, count = effective_ranks(spectrum, threshold)[0]
        kept, told = a.numel() + b.numel(), (past.parameters, past.predicted_loss, past.modality)
        sites.append(SiteRank(name, a.shape[0], past.rank, entropy, count, kept, *told))
    gone = {name: past for name, past in history.items() if name not in layers.pairs}
    sites += [SiteRank(n, 0, past.rank, None, None, 0, *past[1:]) for n, past in gone.items()]
    return RankReport(sites, threshold)


def write(path: Path, found: Prepared) -> None:
    """Write weights, configuration and report, and let them take the place of the old folder."""
    from safetensors.torch import save_file

    peft_model, tensors, config, report = found
    base = peft_model.get_base_model()
    config.inference_mode = True
    config.base_model_name_or_path = (
        config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    )
    mapping = None
    if config.task_type is None:  # as PEFT does, for AutoPeftModel
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    with atomic_folder.replaced(path, drop=(STALE_WEIGHTS,)) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(new), auto_mapping_dict=mapping)
        (new / FILE_NAME).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
