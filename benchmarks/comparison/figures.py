"""Figures of a comparison: curves over steps and seconds, final loss over the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.plots import LOSS, learning_rate_axis, panels, save, styles
from .summary import Cell, Method, reference_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _label(method: Method, best: Cell) -> str:
    return f"{method.label}, learning rate {best.lr:g}"


def _plot_curve(axis: Axes, best: Cell, key: str, label: str, style: dict[str, Any]) -> None:
    """The mean curve, and the range between seeds where there are several."""
    positions, losses = best.curve(key), best.curve("loss")
    axis.plot(positions, losses, label=label, **style)
    if len(best.finished) > 1:
        points = list(zip(*([p["loss"] for p in run["curve"]] for run in best.finished), strict=True))
        axis.fill_between(
            positions, list(map(min, points)), list(map(max, points)), color=style["color"], alpha=0.15
        )


def _cut_start(axis: Axes, cells: Sequence[Cell]) -> None:
    """End the axis below step 0, whose loss would press the curves together; a note gives that loss."""
    curves = [cell.curve("loss") for cell in cells]
    if min(map(len, curves)) < 3:
        return
    low, high = min(map(min, curves)), max(curve[1] for curve in curves)
    axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axis.annotate(f"step 0: {curves[0][0]:.2f}", (0.02, 0.97), xycoords="axes fraction", va="top", fontsize=8)


def draw_curves(found: Sequence[Method], path: Path) -> Path | None:
    """Held-out loss over steps and over seconds, every method at its best rate; None if all diverged."""
    finished = [(method, method.best) for method in found if method.best is not None]
    if not finished:
        return None
    figure, axes = panels(1, 2, 9.0)
    labels = {"step": "training steps", "seconds": "training time (seconds, without evaluation)"}
    for axis, (key, title) in zip(axes, labels.items(), strict=True):
        for (method, best), style in zip(finished, styles(), strict=False):
            _plot_curve(axis, best, key, _label(method, best), style)
        axis.set_xlabel(title)
    _cut_start(axes[0], [best for _, best in finished])
    reference = reference_cell(found)
    if reference is not None and reference.loss is not None:
        for axis in axes:
            axis.axhline(reference.loss, color="#666666", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        across = axes[0].get_yaxis_transform()
        axes[0].annotate("AdamW's best", (0.02, reference.loss), xycoords=across, va="bottom", fontsize=8)
    axes[0].set_ylabel(LOSS)
    axes[1].legend(frameon=False, fontsize=8, loc="upper right")
    return save(figure, path)


def _plot_rates(axis: Axes, method: Method, style: dict[str, Any]) -> None:
    cells = [cell for cell in method.cells if cell.loss is not None]
    losses, spreads = [cell.loss or 0.0 for cell in cells], [cell.spread or 0.0 for cell in cells]
    axis.errorbar([cell.lr for cell in cells], losses, yerr=spreads, capsize=3, label=method.label, **style)


def _mark_diverged(axis: Axes, found: Sequence[Method]) -> None:
    """A cross at the top of the axis for every rate at which a run diverged."""
    for method, style in zip(found, styles(), strict=False):
        rates = [cell.lr for cell in method.cells if cell.diverged]
        if rates:
            heights = [0.97] * len(rates)
            axis.plot(
                rates,
                heights,
                "x",
                color=style["color"],
                markersize=9,
                markeredgewidth=2,
                transform=axis.get_xaxis_transform(),
                label=f"{method.label}: diverged",
            )


def draw_rates(found: Sequence[Method], path: Path) -> Path:
    """Final held-out loss over the learning rate, with the spread between seeds; crosses: diverged runs."""
    figure, (axis,) = panels(1, 1, 5.2)
    for method, style in zip(found, styles(), strict=False):
        _plot_rates(axis, method, style)
    _mark_diverged(axis, found)
    learning_rate_axis(axis, sorted({cell.lr for method in found for cell in method.cells}))
    axis.set_xlabel("peak learning rate (log scale)")
    axis.set_ylabel("final " + LOSS)
    axis.margins(0.12)
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)


def draw(found: Sequence[Method], folder: Path, suffix: str = "") -> list[Path]:
    """Draw both figures into a folder; returns their paths."""
    curves = draw_curves(found, folder / f"curves{suffix}.png")
    rates = draw_rates(found, folder / f"learning_rates{suffix}.png")
    return [path for path in (curves, rates) if path is not None]
