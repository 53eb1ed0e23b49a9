"""Table and figure: held-out loss against the learning rate, one panel for each task, model and length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..comparison.summary import Cell, Method, Result, comparable, loss_surroundings, methods, setting
from ..core.files import BenchmarkError, write_text
from ..core.plots import LOSS, panels, save, styles
from ..core.results import read_results
from ..core.settings import REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, FIGURE = "rates.md", "rates.png"
COLUMNS = 4
_LEGEND = (
    "Final held-out loss in nats per token, mean over n seeds, at equal peak learning rates. Ratio: the rate "
    "over AdamW's best. The difference is GRIT's loss minus AdamW's; below zero GRIT is ahead."
)


def _key(result: Result) -> dict[str, str]:
    """What must agree within a panel: what a loss depends on by more than rounding."""
    own = {
        name: value
        for name, value in setting(result).items()
        if not name.startswith(("hardware ", "version of "))
    }
    return {**own, **loss_surroundings(result)}


def title(result: Result) -> str:
    """A panel's name: the task, the model where it is not the embedded one, and the number of steps."""
    config = result["config"]
    base = config.get("base", "embedded")
    layers = config.get("adapted_layers")
    model = "" if base == "embedded" else f", {base}" + (f" (last {layers} layers)" if layers else "")
    return f"{config['task']}{model}, {config['steps']} steps"


def _pair(found: Sequence[Method], name: str) -> tuple[Method, Method]:
    """AdamW and GRIT."""
    reference = [method for method in found if method.optimizer == REFERENCE]
    others = [method for method in found if method.optimizer != REFERENCE]
    if len(reference) != 1 or len(others) != 1:
        names = ", ".join(method.label for method in found)
        raise BenchmarkError(f"{name}: one adamw and one other optimizer are compared here, found: {names}")
    return reference[0], others[0]


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if cell.loss is None:
        return "diverged"
    return f"{cell.loss:.3f}" + (f" (n={len(cell.finished)})" if len(cell.runs) > 1 else "")


def _rows(reference: Method, other: Method) -> list[str]:
    """One row per learning rate."""
    theirs, ours = ({cell.lr: cell for cell in method.cells} for method in (reference, other))
    best = reference.best
    rows = []
    for lr in sorted(theirs.keys() | ours.keys()):
        one, two = theirs.get(lr), ours.get(lr)
        known = one is not None and two is not None and one.loss is not None and two.loss is not None
        difference = f"{two.loss - one.loss:+.3f}".replace("-", "−") if known else "–"  # type: ignore[operator, union-attr]
        ratio = f"{lr / best.lr:.3g}×" if best else "–"
        rows.append(f"| {lr:g} | {ratio} | {_text(one)} | {_text(two)} | {difference} |")
    return rows


def _section(results: Sequence[Result]) -> str:
    name = title(results[0])
    reference, other = _pair(methods(results), name)
    header = [
        f"| learning rate | ratio | {reference.label} | {other.label} | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([f"### {name}", "", *header, *_rows(reference, other)])


def _plot(axis: Axes, results: Sequence[Result]) -> None:
    """Both optimizers over the rates; a point that would press the curves together lies above the axis."""
    pair = _pair(methods(results), title(results[0]))
    low, high = math.inf, -math.inf
    for method, style in zip(pair, styles(), strict=False):
        cells = [cell for cell in method.cells if cell.loss is not None]
        axis.plot(
            [cell.lr for cell in cells], [cell.loss or 0.0 for cell in cells], label=method.label, **style
        )
        below = [cell.loss or 0.0 for cell in cells if pair[0].best is None or cell.lr <= pair[0].best.lr]
        low, high = min([low, *below]), max([high, *below])
    axis.set_xscale("log")
    if low < high:
        axis.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axis.set_title(title(results[0]), fontsize=9)
    axis.set_xlabel("peak learning rate", fontsize=8)


def draw(groups: Sequence[Sequence[Result]], path: Path) -> Path:
    """One panel for each group of results."""
    columns = min(COLUMNS, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, axes = panels(rows, columns, 3.1 * columns, 2.9 * rows, share_y=False)
    for axis, results in zip(axes, groups, strict=False):
        _plot(axis, results)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel(LOSS, fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    return save(figure, path)


def panels_of(folder: Path) -> list[list[Result]]:
    """The folder's results, those of one task, model and length together, in the order of their titles."""
    groups = [results for _, results in comparable(read_results(folder), _key)]
    return sorted(groups, key=lambda results: title(results[0]))


def text_of(groups: Sequence[Sequence[Result]]) -> str:
    """The Markdown of all panels."""
    return "\n\n".join([*map(_section, groups), _LEGEND]) + "\n"


def report(folder: Path) -> str:
    """Write `rates.md` and `rates.png` into `folder` and print the table; returns the table."""
    groups = panels_of(folder)
    text = text_of(groups)
    write_text(folder / TABLE, text)
    path = draw(groups, folder / FIGURE)
    print(f"{text}\nwritten:\n  {folder / TABLE}\n  {path}")
    return text
