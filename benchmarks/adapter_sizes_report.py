"""Table and figure of held-out loss against bytes of the saved adapter, from the JSON files of ``sizes``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .adapter_sizes import FORMAT, KIND, WHOLE
from .files import BenchmarkError, write_text
from .plots import LOSS, panels, save, styles

Series = dict[str, dict[float, list[dict[str, Any]]]]  # way, budget, one point per seed


def is_folder(folder: Path) -> bool:
    """Whether the folder holds such files."""
    return any(folder.glob(f"{KIND}-*.json"))


def read(folder: Path) -> tuple[Series, dict[str, Any]]:
    """All points by way and budget, and one of the results for what they have in common."""
    series: Series = {}
    result: dict[str, Any] = {}
    for path in sorted(folder.glob(f"{KIND}-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("format") != FORMAT:
            raise BenchmarkError(f"{path} has format {result.get('format')}, this program reads {FORMAT}; run again")
        for point in result["points"]:
            point["seed"] = result["config"]["seed"]
            points = series.setdefault(point["way"], {}).setdefault(point["budget"], [])
            if point["seed"] not in [
                other["seed"] for other in points
            ]:  # the whole adapter comes with every set of budgets
                points.append(point)
    fingerprints = {json.loads(p.read_text(encoding="utf-8"))["fingerprint"] for p in folder.glob(f"{KIND}-*.json")}
    if len(fingerprints) > 1:
        raise BenchmarkError(f"{folder} mixes results of {len(fingerprints)} different data; keep those of one")
    return series, result


def against_whole(series: Series, points: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Bytes and held-out loss relative to the whole adapter of the same seed, means; None where there is none."""
    whole = {p["seed"]: p for p in series.get(WHOLE, {}).get(1.0, [])}
    pairs = [(p, whole[p["seed"]]) for p in points if p["seed"] in whole and p["heldout"] is not None]
    if not pairs:
        return None
    sizes, losses = zip(*((p["bytes"] / w["bytes"], p["heldout"] / w["heldout"]) for p, w in pairs), strict=True)
    return statistics.fmean(sizes) - 1, statistics.fmean(losses) - 1


def table(series: Series, result: dict[str, Any]) -> str:
    """One row per way and budget."""
    lines = [
        "| way | budget | bytes | against whole | held-out loss | against whole | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, budgets in series.items():
        for budget, points in sorted(budgets.items(), reverse=True):
            losses = [p["heldout"] for p in points if p["heldout"] is not None]
            mean = f"{statistics.fmean(losses):.4f}" if losses else "diverged"
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            relative = against_whole(series, points)
            size, loss = ("–", "–") if relative is None else (f"{relative[0]:+.1%}", f"{relative[1]:+.2%}")
            count = f"{statistics.fmean(p['bytes'] for p in points):,.0f}"
            lines.append(f"| {way} | {budget:g} | {count} | {size} | {mean}{spread} | {loss} | {len(points)} |")
    config = result["config"]
    head = (
        f"Task {config['task']}, rate {config['lr']:g} for all, {config['steps']} steps of {config['batch_size']} examples, "
        f"rank {config['rank']} before reduction. Losses of the adapters as read back from their files."
    )
    return "\n".join([head, "", *lines])


def figure(series: Series, path: Path) -> Path:
    """Held-out loss against bytes, a line per way, means over seeds."""
    drawing, (axis,) = panels(1, 1, 7.2, 4.8)
    for look, (way, budgets) in zip(styles(), series.items(), strict=False):
        cells = [
            (statistics.fmean(p["bytes"] for p in points) / 1e3, statistics.fmean(losses))
            for points in budgets.values()
            if (losses := [p["heldout"] for p in points if p["heldout"] is not None])
        ]
        sizes, means = zip(*sorted(cells), strict=True)
        axis.plot(sizes, means, label=way, **look)
        if way == WHOLE:
            axis.axhline(1.005 * means[0], color="0.5", linewidth=1, linestyle=":", label="0.5 % above the whole")
    axis.set_xlabel("bytes of adapter_model.safetensors (kB)")
    axis.set_ylabel(LOSS)
    axis.legend(fontsize=8)
    return save(drawing, path)


def report(folder: Path) -> None:
    """Write ``table.md`` and ``loss_against_bytes.png``, and print the table."""
    series, result = read(folder)
    text = table(series, result) + "\n"
    write_text(folder / "table.md", text)
    print(text)
    print(f"written: {folder / 'table.md'}, {figure(series, folder / 'loss_against_bytes.png')}")
