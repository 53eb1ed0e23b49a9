"""Table and scatter plot of what cutting an adapter costs, from the JSON files of ``truncation``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core import packing
from ..core.files import BenchmarkError, write_text
from ..core.plots import panels, save, styles
from .measure import COMMON_BUDGET, FORMAT, KIND, METHODS

SMALL = 0.01
"""Predicted rise, in nats, up to which a cut counts as small."""

Point = dict[str, Any]
_ALONE = "one site, balanced"


def holds(folder: Path) -> bool:
    """Whether the folder holds results of ``truncation``."""
    return bool(packing.paths(folder, f"{KIND}-*.json"))


def read(folder: Path) -> list[dict[str, Any]]:
    """All measurements of a folder, sorted by name."""
    found = [(path, packing.read(path)) for path in packing.paths(folder, f"{KIND}-*.json")]
    for path, result in found:
        if result.get("format") != FORMAT:
            raise BenchmarkError(
                f"{packing.place(path)} has format {result.get('format')}, "
                f"this program reads {FORMAT}; run again"
            )
    return [result for _, result in found]


def whole(result: dict[str, Any], method: str) -> list[Point]:
    """Cuts of all sites by a method, the smallest first."""
    points = [p for p in result["points"] if p["site"] == "all" and p["method"] == method]
    return sorted(points, key=lambda p: -p["parameters"])


def ratios(points: Iterable[Point], low: float, high: float) -> list[float]:
    """Measured over predicted, of the cuts whose prediction is within bounds."""
    return [p["measured"] / p["predicted"] for p in points if low < p["predicted"] <= high]


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({len(values)} cuts)" if values else "–"


def _constant(result: dict[str, Any]) -> list[str]:
    """The ratio of measured to predicted rises, separately for small and for large predictions."""
    single = [p for p in result["points"] if p["site"] != "all"]
    together = [p for p in result["points"] if p["site"] == "all"]
    second = [
        (p["measured"] - p["first_order"]) / p["predicted"] for p in single if 1e-5 < p["predicted"] <= SMALL
    ]
    return [
        f"- one site cut, predicted 1e-5 to {SMALL:g} nats: measured / predicted = "
        f"{_median(ratios(single, 1e-5, SMALL))}, without the first-order part {_median(second)}",
        f"- one site cut, predicted above {SMALL:g} nats: {_median(ratios(single, SMALL, float('inf')))}",
        f"- all sites cut, predicted up to 0.1 nats: {_median(ratios(together, 1e-5, 0.1))}; above: "
        f"{_median(ratios(together, 0.1, float('inf')))}",
    ]


def table(result: dict[str, Any]) -> str:
    """Rise of the loss by method and rank kept, with the constant between prediction and measurement."""
    ranks = [p["rank"] for p in whole(result, "balanced")]
    lines = [
        "| kept of "
        f"{result['config']['rank']} | "
        + " | ".join(f"{name}: measured, held out, predicted" for name in METHODS)
        + " |",
        "| --- " * (len(METHODS) + 1) + "|",
    ]
    for rank in ranks:
        cells = [next(p for p in whole(result, name) if p["rank"] == rank) for name in METHODS]
        lines.append(f"| {rank} | " + " | ".join(map(_cell, cells)) + " |")
    lines += [
        "",
        "| share of the parameters, one common budget | measured, held out, predicted |",
        "| --- | --- |",
    ]
    lines += [f"| {p['parameters']:.0%} | {_cell(p)} |" for p in whole(result, COMMON_BUDGET)]
    config, loss = result["config"], result["loss"]
    run = (
        f"{config['optimizer']} on {config['task']}, rate {config['lr']:g}, {config['steps']} steps, seed "
        f"{config['seed']}"
    )
    return "\n".join(
        [
            f"{run}: loss {loss['heldout']:.4f} held out, {loss['fresh']:.4f} on the fresh training batches "
            "of the factors. Rise of the loss in nats per token, on those batches and held out; nothing is "
            "trained after the cut.",
            "",
            *lines,
            "",
            "Measured over predicted, median:",
            "",
            *_constant(result),
        ]
    )


def _cell(point: Point) -> str:
    return f"{point['measured']:.4f}, {point['heldout']:.4f}, {point['predicted']:.4f}"


def scatter(results: Sequence[dict[str, Any]], path: Path) -> Path:
    """Predicted against measured rise of the loss, a point per cut; on the right without first-order part."""
    figure, axes = panels(1, 2, 11.5, 5.2)
    for axis, subtracted in zip(axes, (False, True), strict=True):
        for look, name in zip(styles(), [_ALONE, *METHODS, COMMON_BUDGET], strict=False):
            points = [p for result in results for p in result["points"] if _series(p) == name]
            look |= {
                "linestyle": "",
                "markersize": 3 if name == _ALONE else 6,
                "alpha": 0.45 if name == _ALONE else 0.9,
            }
            rises = [p["measured"] - (p["first_order"] if subtracted else 0.0) for p in points]
            axis.plot([p["predicted"] for p in points], rises, label=name, **look)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1e-4)
        low, high = axis.get_xlim()
        line = [low * (high / low) ** (i / 100) for i in range(101)]
        axis.plot(line, line, color="0.4", linewidth=1, label="measured = predicted")
        axis.set_xlim(low, high)
        axis.set_xlabel("predicted rise of the loss, ½·N·T·tr((I−M)ᵀ Σ_g (I−M) Σ_a) (nats per token)")
    axes[0].set_ylabel("measured rise (nats per token; linear below 1e-4)")
    axes[0].set_title("as measured", fontsize=10)
    axes[1].set_title("without the first-order part ⟨∂L/∂B, B M − B⟩", fontsize=10)
    axes[0].legend(fontsize=8)
    return save(figure, path)


def _series(point: Point) -> str:
    return point["method"] if point["site"] == "all" else _ALONE


def report(folder: Path) -> None:
    """Write ``table.md`` and ``scatter.png``, and print the table."""
    results = read(folder)
    text = "\n\n".join(map(table, results)) + "\n"
    write_text(folder / "table.md", text)
    print(text)
    print(f"written: {folder / 'table.md'}, {scatter(results, folder / 'scatter.png')}")
