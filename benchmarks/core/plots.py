"""What all figures share: colours, markers, panels, saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_with

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow: told apart with any colour vision; marker and line tell them apart
# in grey.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
LOSS = "held-out loss (nats per token)"


def styles() -> Iterator[dict[str, Any]]:
    """Looks of lines, one after another, without end."""
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_LINES), strict=False)
    for colour, marker, line in looks:
        yield {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.6}


def panels(
    rows: int, columns: int, width: float, height: float = 3.9, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` by `height` inches (all rows together) and its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=share_y, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def learning_rate_axis(axis: Axes, marks: Sequence[float] | None = None) -> None:
    """A logarithmic axis of learning rates, marked at these ones, or at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(marks) if marks else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG in one step; returns its path."""
    write_with(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
