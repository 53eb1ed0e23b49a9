"""Figures of a suite: curves, learning rates, budgets, and the steps ratio with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.plots import LOSS, learning_rate_axis, panels, save, styles
from ..core.settings import REFERENCE
from .folder import Suite
from .summary import Entry, Standing, entries
from .sweep import Ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 6  # contenders with a colour of their own: more cannot be told apart in one panel
_GREY = {"color": "#B0B0B0", "linestyle": "-", "linewidth": 0.8, "zorder": 1}
_PANEL = (4.4, 3.3)  # inches
_MARKERS = 9  # on a long line; a short one has one at every point
_CURVE_SHOWN = 40  # lowest points of a training curve that its panel must show: the start may leave it
_SMOOTHED = 6  # steps that a point of a training curve is the mean of
Points = list[tuple[float, float]]


def _named(found: Sequence[Entry]) -> list[str]:
    """AdamW's best and the best of the others: what gets a colour. `found` is sorted, the best first."""
    best = [entry for entry in found if entry.loss is not None]
    adamw = [entry for entry in best if entry.contender.optimizer == REFERENCE][:1]
    others = [entry for entry in best if entry.contender.optimizer != REFERENCE]
    return [entry.contender.label for entry in (*adamw, *others)][:_NAMED]


def _looks(found: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    return dict(zip(_named(found), styles(), strict=False))


def _by_task(found: Sequence[Entry], tasks: Sequence[str]) -> Iterator[tuple[str, list[Standing]]]:
    for task in tasks:
        yield task, [one for entry in found for one in entry.standings if one.trial.task == task]


def _task_panels(tasks: Sequence[str]) -> tuple[Figure, list[Axes]]:
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, axes = panels(rows, columns, _PANEL[0] * columns + 0.6, _PANEL[1] * rows + 0.5, share_y=False)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    return figure, axes[: len(tasks)]


def _cut_above(axis: Axes, named: Sequence[Points], others: Sequence[Points], shown: int | None) -> None:
    """End the axis not far above the named lines' `shown` lowest points, so that these stay apart.

    How many lines lie outside as a whole is said in the panel. None: all points of the named lines are shown.
    """
    heights = [height for line in named for height in sorted(height for _, height in line)[:shown]]
    if not heights:
        return
    everything = [*heights, *(height for line in others for _, height in line)]
    low, high = min(everything), max(heights)
    top = min(high + 0.8 * (high - low), max(everything)) + 0.05 * (high - low)
    if top > low:
        axis.set_ylim(low - 0.07 * (top - low), top)
    outside = sum(1 for line in others if line and min(height for _, height in line) > top)
    if outside:
        axis.annotate(
            f"{outside} others lie above", (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=7
        )


def _draw_lines(
    axis: Axes, lines: dict[str, Points], looks: dict[str, dict[str, Any]], shown: int | None
) -> dict[str, Any]:
    """Draw named lines in their looks and the rest in grey; returns one handle for each legend entry."""
    handles = {}
    for label, line in lines.items():
        every = max(1, len(line) // _MARKERS)
        (handle,) = axis.plot(*zip(*line, strict=True), **looks.get(label, _GREY), markevery=every)
        handles[label if label in looks else "others"] = handle
    named = [line for label, line in lines.items() if label in looks]
    _cut_above(axis, named, [line for label, line in lines.items() if label not in looks], shown)
    return handles


def _draw_tasks(
    found: Sequence[Entry],
    tasks: Sequence[str],
    path: Path,
    points: Callable[[Standing], Points],
    finish: Callable[[Axes, list[Standing]], None],
    shown: int | None,
) -> Path:
    """A panel per task, a line per contender: the named ones in colour, the rest in grey."""
    figure, axes = _task_panels(tasks)
    looks, handles = _looks(found), dict[str, Any]()
    for axis, (task, standings) in zip(axes, _by_task(found, tasks), strict=True):
        lines = {one.label: points(one) for one in standings}
        handles |= _draw_lines(axis, {label: line for label, line in lines.items() if line}, looks, shown)
        axis.set_title(task, fontsize=10)
        axis.set_ylabel(LOSS, fontsize=8)
        axis.tick_params(labelsize=8)
        finish(axis, standings)
    order = [name for name in (*looks, "others") if name in handles]
    if order:
        entries_of = [handles[name] for name in order]
        figure.legend(
            entries_of, order, loc="outside lower center", ncols=min(4, len(order)), frameon=False, fontsize=8
        )
    return save(figure, path)


def training_curve(one: Standing) -> Points:
    """Mean loss of the newest training batches before they are trained on, over the seeds, at the best rate.

    The batches are the same for all contenders, so their ups and downs are common to all lines.
    """
    steps = [
        statistics.fmean(losses) for losses in zip(*(run["train_losses"] for run in one.runs), strict=True)
    ]
    return [(end, statistics.fmean(steps[end - _SMOOTHED : end])) for end in range(_SMOOTHED, len(steps) + 1)]


def _target_line(axis: Axes, standings: Sequence[Standing]) -> None:
    target = standings[0].target
    if target is not None:
        axis.axhline(target, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        across = axis.get_yaxis_transform()
        axis.annotate(
            "AdamW's best", (0.01, target), xycoords=across, va="bottom", fontsize=7, color="#333333"
        )


def _finish_curves(axis: Axes, standings: list[Standing]) -> None:
    axis.set_xlabel("training steps", fontsize=8)
    axis.set_ylabel(f"unseen batches, mean of {_SMOOTHED} steps (nats/token)", fontsize=8)


def _rate_points(one: Standing) -> Points:
    """Mean final loss over the seeds so far, by learning rate, where none diverged."""
    losses: dict[float, list[float]] = {}
    for run in one.full_runs:
        losses.setdefault(run["config"]["lr"], []).append(math.inf if run["diverged"] else run["final_loss"])
    return [(lr, statistics.fmean(found)) for lr, found in sorted(losses.items()) if max(found) < math.inf]


def _finish_rates(axis: Axes, standings: list[Standing]) -> None:
    """A logarithmic axis, and a cross for every rate at which a run diverged."""
    learning_rate_axis(axis)
    axis.tick_params(axis="x", labelsize=6.5)
    axis.set_xlabel("peak learning rate (log scale; mean of the seeds run at it)", fontsize=8)
    rates = sorted({lr for one in standings for lr in one.diverged})
    if rates:
        across = axis.get_xaxis_transform()
        axis.plot(rates, [0.97] * len(rates), "x", color="#777777", markersize=6, transform=across)
        axis.annotate(
            "× a run diverged", (0.98, 0.9), xycoords="axes fraction", ha="right", fontsize=7, color="#555555"
        )


def _budget_points(one: Standing) -> Points:
    """Mean final loss over the seeds by budget in steps, at the best rate."""
    if one.measured is None:
        return []
    means = zip(one.measured.budgets, map(statistics.fmean, one.measured.losses), strict=True)
    return [(steps, loss) for steps, loss in means if math.isfinite(loss)]


def _finish_budgets(axis: Axes, standings: list[Standing]) -> None:
    axis.set_xlabel("budget (steps; schedule shortened with it)", fontsize=8)
    _target_line(axis, standings)


def _bar(axis: Axes, height: float, entry: Entry, colour: str, longest: float) -> None:
    """The interpolated ratio with its interval, and the measured one; an open interval ends in an arrow."""
    found = entry.interval
    if found and math.isfinite(found.low):
        axis.plot([found.low, min(found.high, longest)], [height, height], color=colour, linewidth=1.4)
        if math.isinf(found.high):
            axis.plot(longest, height, ">", color=colour, markersize=4)
    axis.plot(entry.steps_ratio or 0.0, height, "o", color=colour, markersize=6, fillstyle="none")
    axis.plot(entry.interpolated or 0.0, height, "o", color=colour, markersize=5)


def _label_ratios(axis: Axes, labels: list[str]) -> None:
    axis.axvline(1.0, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylim(-0.7, len(labels) - 0.3)
    axis.set_xlabel(
        "steps to AdamW's best loss, as a ratio to AdamW's full budget (mean over tasks)", fontsize=8
    )
    axis.set_title(
        "●: interpolated, with 95 % bootstrap interval over seeds; ○: shortest budget measured\n"
        "|: single tasks, interpolated; ▷: at least, the target of a task was not reached",
        fontsize=7,
        loc="left",
    )


def draw_ratios(found: Sequence[Entry], path: Path) -> Path | None:
    """Mean steps ratio of every contender with its interval, tasks as small marks; None without any ratio."""
    shown = [entry for entry in found if entry.steps_ratio is not None][::-1]
    if not shown:
        return None
    sizes, looks = shown[0].standings[0].trial.settings, _looks(found)
    longest = sizes.budgets()[-1] / sizes.steps
    figure, (axis,) = panels(1, 1, 6.4, 1.2 + 0.25 * len(shown))
    for height, entry in enumerate(shown):
        colour = looks.get(entry.contender.label, {"color": "#666666"})["color"]
        marks = [min(one.interpolated or 0.0, longest) for one in entry.standings]
        axis.plot(marks, [height] * len(marks), "|", color="#888888", markersize=8, zorder=1)
        if entry.at_least is None:
            _bar(axis, height, entry, colour, longest)
        else:
            axis.plot(entry.at_least, height, ">", color=colour, markersize=6, fillstyle="none")
    _label_ratios(axis, [entry.contender.label for entry in shown])
    return save(figure, path)


def draw(
    suite: Suite, ledger: Ledger, costs: Mapping[str, Mapping[str, Any]], folder: Path, suffix: str = ""
) -> list[Path]:
    """Draw all figures into a folder; returns their paths."""
    found = entries(suite.trials(ledger), costs)
    kinds = {
        "curves": (training_curve, _finish_curves, _CURVE_SHOWN),
        "learning_rates": (
            _rate_points,
            _finish_rates,
            2,
        ),  # the best rate and the better neighbour; arms may leave the panel
        "budgets": (_budget_points, _finish_budgets, None),
    }
    paths = [
        _draw_tasks(found, suite.tasks, folder / f"{name}{suffix}.png", points, finish, shown)
        for name, (points, finish, shown) in kinds.items()
    ]
    ratios = draw_ratios(found, folder / f"steps_ratio{suffix}.png")
    return paths + ([ratios] if ratios else [])
