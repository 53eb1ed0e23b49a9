"""Table and figure of held-out loss against bytes of the saved adapter, from the JSON files of ``sizes``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import packing
from ..core.files import BenchmarkError, write_text
from ..core.plots import panels, save, styles
from .measure import FORMAT, KIND
from .ways import WHOLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = dict[str, Any]
Budgets = dict[float | None, list[Point]]  # by budget (None: the way's own rule decides), one point per seed
Series = dict[str, Budgets]  # by way
Tasks = dict[
    str, tuple[Series, dict[str, Any]]
]  # by task, with the configuration that its runs have in common
OURS = "grit, rank_budget"
SHOWN = 0.49
"""The budget of the table's first part: with what a file has beside the tensors, half the bytes."""
AIM = 0.005
"""Rise of the held-out loss that is aimed at, as a share of the whole adapter's."""
_TICKS = (-2, -1, 0, 0.5, 1, 1.5, 2, 5, 10, 20, 50, 100, 200)
SLACK = 1.03
"""How many more bytes a way may have to count as one of the same size: ranks are whole numbers."""


def holds(folder: Path) -> bool:
    """Whether the folder holds results of ``sizes``."""
    return bool(packing.paths(folder, f"{KIND}-*.json"))


def _results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their names."""
    found = []
    for path in packing.paths(folder, f"{KIND}-*.json"):
        result = packing.read(path)
        if result.get("format") != FORMAT:
            raise BenchmarkError(
                f"{packing.place(path)} has format {result.get('format')}, "
                f"this program reads {FORMAT}; run again"
            )
        found.append(result)
    for task in {result["config"]["task"] for result in found}:
        kinds = {(r["fingerprint"], *_length(r["config"])) for r in found if r["config"]["task"] == task}
        if len(kinds) > 1:
            raise BenchmarkError(
                f"{folder} mixes runs of {task} that differ in data, length or precision; keep one kind"
            )
    return found


def _length(config: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(config[name] for name in ("steps", "batch_size", "rank", "precision"))


def _label(way: str, options: dict[str, Any]) -> str:
    """The way's name, with the options that the command was given."""
    extra = [f"{name}={value}" for name, value in sorted(options.items()) if name != "budgets"]
    return f"{way} ({', '.join(extra)})" if extra else way


def _points(results: Iterable[dict[str, Any]]) -> dict[str, list[Point]]:
    """Points of one task by way; each knows its seed, its rate and β₁."""
    found: dict[str, list[Point]] = {}
    for result in results:
        config = result["config"]
        for point in result["points"]:
            known = {name: config[name] for name in ("seed", "lr", "beta1")}
            found.setdefault(_label(point["way"], config["options"]), []).append({**point, **known})
    return found


def _setting(point: Point) -> tuple[float, float]:
    return point["lr"], point["beta1"]


def _cell(point: Point) -> tuple[float | None, int]:
    return point["budget"], point["seed"]


def best_setting(points: Sequence[Point]) -> tuple[float, float]:
    """The rate and β₁ with the lowest mean loss over the budgets and seeds that all settings have."""
    losses: dict[tuple[float, float], dict[Any, float]] = {}
    for point in points:
        loss = math.inf if point["heldout"] is None else point["heldout"]
        losses.setdefault(_setting(point), {})[_cell(point)] = loss
    shared = set.intersection(*(set(cells) for cells in losses.values()))
    if not shared:
        raise BenchmarkError(
            f"the rates of {points[0]['way']!r} have no budget and seed in common; run one with all rates"
        )
    return min(losses, key=lambda setting: statistics.fmean(losses[setting][cell] for cell in shared))


def read(folder: Path) -> Tasks:
    """By task: every way's points at its best rate, and the configuration of one of its runs."""
    results, tasks = _results(folder), {}
    for task in sorted({result["config"]["task"] for result in results}):
        of_task, series = [result for result in results if result["config"]["task"] == task], Series()
        for way, points in _points(of_task).items():
            best = best_setting(points)
            chosen = {
                _cell(p): {**p, "rates": sorted({q["lr"] for q in points})}
                for p in points
                if _setting(p) == best
            }
            for budget, seed in sorted(chosen, key=lambda cell: (cell[0] or 0, cell[1])):
                series.setdefault(way, {}).setdefault(budget, []).append(chosen[budget, seed])
        tasks[task] = series, of_task[0]["config"]
    return tasks


def rises(series: Series, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Bytes and held-out loss over those of the whole adapter, less 1; a pair per seed that has both."""
    whole = {p["seed"]: p for p in series.get(WHOLE, {}).get(1.0, [])}
    pairs = [(p, whole[p["seed"]]) for p in points if p["seed"] in whole and p["heldout"] is not None]
    return [(p["bytes"] / w["bytes"] - 1, p["heldout"] / w["heldout"] - 1) for p, w in pairs]


def against_whole(series: Series, points: Sequence[Point]) -> tuple[float, float] | None:
    """Means of :func:`rises`; None where there is no whole adapter to compare with."""
    found = rises(series, points)
    return (
        None if not found else (statistics.fmean(f[0] for f in found), statistics.fmean(f[1] for f in found))
    )


def _mean(points: Sequence[Point]) -> tuple[float, float] | None:
    """Mean bytes and held-out loss; None where a run diverged."""
    if any(p["heldout"] is None for p in points):
        return None
    return statistics.fmean(p["bytes"] for p in points), statistics.fmean(p["heldout"] for p in points)


def lower_ways(series: Series, budget: float) -> list[str]:
    """Ways with a lower mean loss than ``rank_budget``, over the same seeds, at ``SLACK`` times its bytes."""
    ours = series[OURS][budget]
    seeds, size = {p["seed"] for p in ours}, statistics.fmean(p["bytes"] for p in ours)
    found = []
    for way, budgets in series.items():
        for points in budgets.values():
            same = [p for p in points if p["seed"] in seeds]
            cell = _mean(same) if same else None
            base = _mean([p for p in ours if p["seed"] in {q["seed"] for q in same}])
            if way != OURS and cell and base and cell[0] <= SLACK * size and cell[1] < base[1]:
                found.append(way)
    return sorted(set(found))


def _row(series: Series, way: str, budget: float | None, points: Sequence[Point]) -> str:
    losses = [p["heldout"] for p in points if p["heldout"] is not None]
    mean = f"{statistics.fmean(losses):.4f}" if losses else "diverged"
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    relative, each = against_whole(series, points), rises(series, points)
    size, loss = ("–", "–") if relative is None else (f"{relative[0]:+.1%}", f"{relative[1]:+.2%}")
    if len(each) > 1 and way != WHOLE:
        loss += f" ({', '.join(f'{rise:+.2%}' for _, rise in each)})"
    rates, first = points[0]["rates"], points[0]
    searched = f" of {', '.join(f'{rate:g}' for rate in rates)}" if len(rates) > 1 else ""
    share = "–" if budget is None else f"{budget:g}"
    count = f"{statistics.fmean(p['bytes'] for p in points):,.0f}"
    return (
        f"| {way} | {first['lr']:g}{searched}; {first['beta1']:g} | {share} | {count} | {size} | "
        f"{mean}{spread} | {loss} | {len(points)} |"
    )


def _verdict(series: Series) -> list[str]:
    """What the comparison says of ``rank_budget`` at every budget."""
    lines = []
    for budget in sorted((b for b in series.get(OURS, {}) if b is not None), reverse=True):
        lower, relative = lower_ways(series, budget), against_whole(series, series[OURS][budget])
        size = "" if relative is None else f" ({relative[0]:+.1%} bytes, {relative[1]:+.2%} loss)"
        lines.append(
            f"- rank_budget={budget:g}{size}: {', '.join(lower) + ' lower' if lower else 'no way is lower'}"
        )
    return lines


def section(task: str, series: Series, config: dict[str, Any]) -> str:
    """One task: a row per way and budget, then where ``rank_budget`` stands."""
    lines = [
        "| way | rate; β₁ | budget | bytes | against whole | held-out loss | against whole (each seed) | "
        "seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, budgets in series.items():
        for budget, points in sorted(budgets.items(), key=lambda item: -(item[0] or 0)):
            lines.append(_row(series, way, budget, points))
    head = (
        f"**{task}**: {config['steps']} steps of {config['batch_size']} examples, rank {config['rank']} "
        f"before reduction, {config['precision']}."
    )
    return "\n\n".join([head, "\n".join(lines), *filter(None, ["\n".join(_verdict(series))])])


def summary(tasks: Tasks, budget: float) -> str:
    """A table at one budget: bytes and held-out loss of every way and task against the whole adapter."""
    ways = list(dict.fromkeys(way for series, _ in tasks.values() for way in series if way != WHOLE))
    lines = [f"| budget {budget:g} | {' | '.join(tasks)} |", "| --- " * (len(tasks) + 1) + "|"]
    for way in sorted(ways, key=lambda way: way != OURS):
        found = [_points_at(series, way, budget) for series, _ in tasks.values()]
        if any(found):
            cells = (
                _short(series, points) for (series, _), points in zip(tasks.values(), found, strict=True)
            )
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _points_at(series: Series, way: str, budget: float) -> list[Point]:
    """The way's points at a budget; where its own rule decides the size, all of its points."""
    budgets = series.get(way, {})
    return budgets.get(budget, budgets.get(None, []))


def _short(series: Series, points: Sequence[Point]) -> str:
    """Bytes and loss against the whole adapter, and over how many seeds."""
    relative = against_whole(series, points)
    return (
        "–"
        if relative is None
        else f"{relative[0]:+.1%}, **{relative[1]:+.2%}** (n={len(rises(series, points))})"
    )


def table(tasks: Tasks, budget: float = SHOWN) -> str:
    """The page: a table of every task, and what the columns mean."""
    legend = (
        "Losses, in nats per token, of the adapters as read back from their files; bytes of "
        "adapter_model.safetensors. Each way at its best rate of those named (lowest mean over the seeds and "
        "budgets that all of them have). Where all layers have one rank it is the nearest, at 0.49 half. The "
        "paper's projections leave the file as large as it was; counted is the SVD of the projected ΔW. EVA "
        "reads 24 of the training batches once more at the start. Below each table: ways with a lower mean "
        f"loss, over the seeds that both have, at up to {SLACK - 1:.0%} more bytes."
    )
    return "\n\n".join(
        [summary(tasks, budget), legend, *(section(task, *found) for task, found in tasks.items())]
    )


def figure(tasks: Tasks, path: Path) -> Path:
    """Rise of the held-out loss over the whole adapter's against bytes: a panel per task, a line per way."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    drawing, axes = panels(rows, columns, 7.2 * columns, 4.6 * rows, share_y=False)
    names = sorted(
        {way for series, _ in tasks.values() for way in series}, key=lambda way: (way != OURS, way)
    )
    looks = dict(zip(names, styles(), strict=False))
    for way in names[7:]:  # where colours and markers come again
        looks[way]["markerfacecolor"] = "white"
    for axis, (task, (series, _)) in zip(axes, tasks.items(), strict=False):
        _panel(axis, series, {name: looks[name] for name in names if name in series})
        axis.set_title(task, fontsize=10)
    for axis in axes[::columns]:
        axis.set_ylabel("held-out loss over the whole adapter's (%; linear below 2)")
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    return save(drawing, path)


def _panel(axis: Axes, series: Series, looks: dict[str, dict[str, Any]]) -> None:
    """One task's lines; the scale ends a little beyond the lowest and the highest point."""
    low, top = 0.0, 1.0
    for way, look in looks.items():
        found = ((points, against_whole(series, points)) for points in series[way].values())
        cells = sorted((_kilobytes(points), 100 * rise[1]) for points, rise in found if rise is not None)
        if cells:
            axis.plot(*zip(*cells, strict=True), label=way, **look)
            rises = [rise for _, rise in cells]
            low, top = min(low, *rises), max(top, *rises)
    axis.axhline(100 * AIM, color="0.5", linewidth=1, linestyle=":", label=f"{AIM:.1%} above the whole")
    axis.set_yscale("symlog", linthresh=2, linscale=2)
    axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axis.set_ylim(low - 0.3, 1.2 * top)
    axis.set_xlabel("bytes of adapter_model.safetensors (kB)")
    axis.legend(fontsize=7)


def _kilobytes(points: Sequence[Point]) -> float:
    return statistics.fmean(p["bytes"] for p in points) / 1e3


def report(folder: Path) -> None:
    """Write ``table.md`` and ``loss_against_bytes.png``, and print the table."""
    tasks = read(folder)
    text = table(tasks) + "\n"
    write_text(folder / "table.md", text)
    print(text)
    print(f"written: {folder / 'table.md'}, {figure(tasks, folder / 'loss_against_bytes.png')}")
