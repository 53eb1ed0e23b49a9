"""Table and figures of a folder of costs, from its JSON files and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core import packing
from ..core.files import write_text
from ..core.plots import panels, save, styles
from .tables import cost_table, count_table, scaling_table, sizes_table

KINDS = ("cost", "count", "scaling")


def _paths(folder: Path, kind: str) -> list[Path]:
    return packing.paths(folder, f"{kind}-*.json")


def holds(folder: Path) -> bool:
    """Whether the folder holds measurements, counts or scalings."""
    return any(_paths(folder, kind) for kind in KINDS)


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    """All results of one kind, by file name."""
    return [packing.read(path) for path in _paths(folder, kind)]


def table(folder: Path) -> str:
    """All of a folder's tables."""
    costs = read(folder, "cost")
    parts = [cost_table(costs)] if costs else []
    parts += map(scaling_table, read(folder, "scaling"))
    counts = read(folder, "count")
    parts += map(count_table, counts)
    parts += [sizes_table(counts)] if len(counts) > 1 else []
    return "\n\n".join(parts) + "\n"


def _draw_axis(axis: Any, points: Sequence[dict[str, Any]], key: str) -> None:
    """One line per optimizer: median and quartiles of the ratio."""
    names = list(dict.fromkeys(name for point in points for name in point["results"] if name != "adamw"))
    for look, name in zip(styles(), names, strict=False):
        there = [
            (point[key], point["results"][name]["ratio"]) for point in points if name in point["results"]
        ]
        if not there:
            continue
        sizes, ratios = zip(*there, strict=True)
        medians = [ratio["median"] for ratio in ratios]
        spread = [
            [m - r["q1"] for m, r in zip(medians, ratios, strict=True)],
            [r["q3"] - m for m, r in zip(medians, ratios, strict=True)],
        ]
        axis.errorbar(sizes, medians, yerr=spread, label=name, capsize=3, **look)
    axis.axhline(1.0, color="0.5", linewidth=1)
    axis.set_xscale("log", base=2)


def figure(result: dict[str, Any], path: Path) -> Path:
    """Step time against AdamW's over tokens and over sites."""
    drawing, axes = panels(1, 2, 10, 4.2)
    labels = {"tokens": "tokens of a pass", "layers": "sites (LoRA pairs)"}
    for axis, (kind, label) in zip(axes, labels.items(), strict=True):
        points = [point for point in result["points"] if point["axis"] == kind]
        _draw_axis(axis, points, "tokens" if kind == "tokens" else "sites")
        axis.set_xlabel(label)
    axes[0].set_ylabel("step time against AdamW's")
    axes[0].legend(fontsize=8)
    axes[0].set_title(result["model"], fontsize=10)
    return save(drawing, path)


def report(folder: Path) -> None:
    """Write `table.md` and a figure of every scaling, and print the table."""
    text = table(folder)
    write_text(folder / "table.md", text)
    drawn = [figure(packing.read(path), path.with_suffix(".png")) for path in _paths(folder, "scaling")]
    print(text)
    print("\n".join(["written:", *(f"  {path}" for path in [folder / "table.md", *drawn])]))
