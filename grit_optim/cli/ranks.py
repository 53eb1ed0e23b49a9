"""``python -m grit_optim ranks PATH``: show the ranks in a saved adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from grit_optim.export.files import LORA_A, LORA_B, PREFIX, WEIGHTS
from grit_optim.rank.report import (
    FILE_NAME,
    FORMAT,
    RankReport,
    SiteRank,
    effective_ranks,
    product_singular_values,
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command ``ranks`` to a command line."""
    text = "show ranks, effective ranks, parameters and predicted losses of a saved LoRA adapter"
    parser = commands.add_parser("ranks", help=text, description=text)
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="folder of an adapter that PEFT or save_adapter wrote"
    )
    parser.add_argument("--json", action="store_true", help="as JSON instead of a table")
    parser.add_argument(
        "--threshold", type=float, default=0.99, help="τ of the effective rank by threshold (by default 0.99)"
    )
    parser.set_defaults(call=show)


def show(arguments: argparse.Namespace) -> None:
    """Print the report."""
    report = read_ranks(arguments.path, arguments.threshold)
    print(json.dumps(report.as_dict(), indent=1) if arguments.json else report.table())


def read_ranks(path: Path, threshold: float = 0.99) -> RankReport:
    """The ranks in the adapter at ``path``, whoever wrote it.

    Ranks and sizes come from the tensors in the file. Earlier ranks, sites that were left out and predicted
    losses come from ``grit_ranks.json``, where there is one.

    Args:
        path: the adapter's folder.
        threshold: τ of the effective ranks.

    Raises:
        ValueError: no LoRA adapter there, or a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold must be in (0, 1], got {threshold}")
    tensors = _read_tensors(path)
    past = _read_past(path)
    sites = [
        _site(key.removesuffix(LORA_A), tensors, past, threshold) for key in tensors if key.endswith(LORA_A)
    ]
    if not sites:
        raise ValueError(
            f"{path / WEIGHTS} holds no LoRA matrices (tensors named …{LORA_A}). It may be the adapter of "
            "another method; pass the folder of a LoRA adapter"
        )
    present = {site.name for site in sites}
    left_out = [
        SiteRank(name, 0, p["rank_before"], None, None, 0, p["parameters_before"], *_told(p))
        for name, p in past.items()
        if name not in present
    ]
    return RankReport(sites + left_out, threshold)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The adapter's tensors, by name.

    Raises:
        ValueError: there is no adapter, or its file is damaged, or safetensors is missing.
    """
    if not (path / WEIGHTS).is_file():
        raise ValueError(
            f"{path} is no saved adapter: it has no {WEIGHTS}. Pass the folder that "
            "model.save_pretrained() or optimizer.save_adapter() wrote"
        )
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("reading adapters needs safetensors: pip install safetensors") from error
    try:
        return load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged: {error}") from error


def _read_past(path: Path) -> dict[str, dict[str, Any]]:
    """What ``grit_ranks.json`` says, by the layer's name; empty where there is no such file.

    Raises:
        ValueError: the file is not what ``save_adapter`` writes.
    """
    file = path / FILE_NAME
    if not file.is_file():
        return {}
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this grit_optim reads {FORMAT}")
        for site in saved["sites"]:
            if lacking := {"name", "rank_before", "parameters_before", "predicted_loss"} - site.keys():
                raise ValueError(f"a site without {', '.join(sorted(lacking))}")
        return {site["name"]: site for site in saved["sites"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not what save_adapter() wrote ({error}); delete it to see the tensors alone"
        ) from error


def _site(
    place: str, tensors: dict[str, Tensor], past: dict[str, dict[str, Any]], threshold: float
) -> SiteRank:
    """One site, from its two tensors.

    Raises:
        ValueError: B is missing.
    """
    if place + LORA_B not in tensors:
        raise ValueError(f"the adapter is damaged: it holds {place}{LORA_A} and no {place}{LORA_B}")
    a, b = tensors[place + LORA_A].float(), tensors[place + LORA_B].float()
    name = place.removeprefix(PREFIX)
    known = past.get(name, {})
    finite = bool(a.isfinite().all() and b.isfinite().all())  # the weights of a diverged run have no spectrum
    entropy, count = (
        effective_ranks(product_singular_values(a, b)[None], threshold)[0] if finite else (None, None)
    )
    size = a.numel() + b.numel()
    before = known.get("rank_before", a.shape[0]), known.get("parameters_before", size)
    return SiteRank(name, a.shape[0], before[0], entropy, count, size, before[1], *_told(known))


def _told(past: dict[str, Any]) -> tuple[Any, Any]:
    """What only ``grit_ranks.json`` knows of a site: the predicted loss and the modality."""
    return past.get("predicted_loss"), past.get("modality")
