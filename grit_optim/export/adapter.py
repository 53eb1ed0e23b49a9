"""Writing a PEFT adapter whose tensors are physically as small as its ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_optim.export import atomic_folder
from grit_optim.export import peft_config as adapter_config
from grit_optim.lora.discovery import AdapterLayers, adapter_layers, peft_model_in
from grit_optim.lora.site import Site
from grit_optim.messages import listed
from grit_optim.rank.report import FILE_NAME, RankReport, SiteRank, effective_ranks, product_singular_values

WEIGHTS, STALE_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What an adapter can be saved in: the types that PEFT reads on every device."""
_PREFIX = "base_model.model."  # what PEFT puts in front of the base model's names


class History(NamedTuple):
    """What is known of a site beside its weights: what it was at first, and what dropping ranks was predicted to cost."""

    rank: int
    parameters: int
    predicted_loss: float | None


class Pair(NamedTuple):
    """A and B as they are to be saved."""

    a: Tensor
    b: Tensor


@torch.no_grad()
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

    Directions whose row of A or column of B is exactly zero are left out, and so are layers that keep none.
    The model is not changed. ``path`` holds the old adapter or the new one at every moment, however the
    process ends.

    Args:
        model: the PEFT model, or a wrapper that holds it.
        path: the folder to write; what else is in it stays.
        adapter: the adapter's name; needed where there are several.
        fold_scale: multiply the scale s into B and save ``alpha = r``, for programs that ignore
            ``alpha_pattern`` and rsLoRA.
        tolerance: also leave out what ΔW's singular values show to be unused: those up to this share of the
            layer's largest. Layers with such are written as the factors of their SVD. 0 changes no weight.
        dtype: ``torch.bfloat16`` or ``torch.float16`` to save an adapter that was trained in fp32 at half the
            bytes, rounded;
            None: as it is. PEFT makes it fp32 again when it loads it, unless told otherwise.
        history: site name (name in the base model) to what is known of its past;
            :meth:`GritOptimizer.save_adapter` passes it.
        threshold: τ of the report.

    Returns:
        The ranks, also saved as ``grit_ranks.json``.

    Raises:
        ValueError: no PEFT adapter of that name, DoRA or no LoRA at all, a start that changed the base
            weights, no direction left, or a value that ``dtype`` cannot hold.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance must be a share of the largest singular value in [0, 1), got {tolerance!r}"
        )
    peft_model = peft_model_in(model)
    adapter = adapter_config.choose_adapter(peft_model, adapter)
    config = peft_model.peft_config[adapter]
    adapter_config.check_exportable(config, adapter)
    layers = adapter_layers(peft_model, adapter)
    broken = [
        name
        for name, site in layers.pairs.items()
        if not (site.a.isfinite().all() and site.b.isfinite().all())
    ]
    if broken:
        raise ValueError(
            f"adapter {adapter!r} has weights that are infinite or NaN in {len(broken)} layer(s) "
            f"({listed(broken, 3)}): the run has diverged; go back to an earlier checkpoint, or save it as "
            "it is with model.save_pretrained()"
        )
    smaller = {name: _reduced(site, tolerance) for name, site in layers.pairs.items()}
    ranks = {name: pair.a.shape[0] for name, pair in smaller.items()}
    if not any(ranks.values()):
        raise ValueError(
            f"adapter {adapter!r} has no direction to save: in each of its {len(ranks)} layers "
            f"({listed(list(ranks), 3)}) A or B is zero. It has not been trained yet, or the rank budget "
            "left nothing; PEFT cannot load an adapter of rank 0"
        )
    saved = adapter_config.with_ranks(config, layers, ranks, fold_scale)
    report = _report(layers, smaller, history or {}, threshold)
    tensors = _tensors(peft_model, layers, smaller, fold_scale)
    _write(Path(path), peft_model, tensors if dtype is None else _rounded(tensors, dtype), saved, report)
    return report


def _reduced(site: Site, tolerance: float) -> Pair:
    """The pair without what it does not use; a bias that is trained needs a direction to hang on."""
    a, b = site.a.detach(), site.b.detach()
    used = (a.flatten(1) != 0).any(1) & (b.transpose(0, 1).flatten(1) != 0).any(1)
    if site.trains_bias and not used.any():
        used[0] = True
    kept = Pair(a[used], b[:, used])
    return _compressed(kept, tolerance) if tolerance > 0 and kept.a.shape[0] > 1 else kept


def _compressed(pair: Pair, tolerance: float) -> Pair:
    """The factors of the SVD of B·A, where some of its singular values are up to ``tolerance`` times the largest."""
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
    """PEFT's own tensors of the adapter, by PEFT's names, with the smaller pairs in place of the full ones."""
    from peft import get_peft_model_state_dict

    adapter = next(iter(layers.pairs.values())).adapter
    tensors = {
        key.replace("._orig_mod", ""): t
        for key, t in get_peft_model_state_dict(peft_model, adapter_name=adapter).items()
    }
    for name, pair in smaller.items():
        place, site = f"{_PREFIX}{name}", layers.pairs[name]
        if f"{place}.lora_A.weight" not in tensors:
            raise ValueError(
                f"PEFT does not save layer {name!r} of adapter {adapter!r}; please report this with the "
                "model's name"
            )
        if pair.a.shape[0] == 0:
            del tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"]
            continue
        scale = site.scaling if fold_scale else 1.0
        tensors[f"{place}.lora_A.weight"] = pair.a
        tensors[f"{place}.lora_B.weight"] = pair.b if scale == 1 else pair.b * scale
        if scale != 1 and site.has_bias:
            tensors[f"{place}.lora_B.bias"] = tensors[f"{place}.lora_B.bias"] * scale
    if fold_scale:
        _fold_others(tensors, layers, adapter)
    # Views would bring their whole storage along, and the file must not share memory with the model.
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def _rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in that type, but for those that hold no floating-point numbers."""
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


def _fold_others(tensors: dict[str, Tensor], layers: AdapterLayers, adapter: str) -> None:
    for name, layer in layers.others.items():
        key = f"{_PREFIX}{name}.lora_embedding_B"
        if key not in tensors:
            raise ValueError(
                f"fold_scale=True cannot fold the scale of layer {name!r} ({type(layer).__name__}); leave "
                "it at False"
            )
        tensors[key] = tensors[key] * layer.scaling[adapter]


def _report(
    layers: AdapterLayers, smaller: Mapping[str, Pair], history: Mapping[str, History], threshold: float
) -> RankReport:
    """What is saved of each layer, and what is left out."""
    sites = []
    for name, site in layers.pairs.items():
        a, b = smaller[name]
        past = history.get(name, History(site.rank, site.parameters, None))
        spectrum = product_singular_values(a, b)[None] if a.shape[0] else torch.zeros(1, 1)
        entropy, count = effective_ranks(spectrum, threshold)[0]
        sites.append(
            SiteRank(
                name,
                a.shape[0],
                past.rank,
                entropy,
                count,
                a.numel() + b.numel(),
                past.parameters,
                past.predicted_loss,
            )
        )
    gone = [name for name in history if name not in layers.pairs]
    sites += [
        SiteRank(n, 0, history[n].rank, None, None, 0, history[n].parameters, history[n].predicted_loss)
        for n in gone
    ]
    return RankReport(sites, threshold)


def _write(path: Path, peft_model: Any, tensors: dict[str, Tensor], config: Any, report: RankReport) -> None:
    from safetensors.torch import save_file

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
