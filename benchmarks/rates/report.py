"""Tables and figure: held-out loss against the learning rate, one panel for each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..comparison.summary import Cell, Method, Result, comparable, loss_setting, methods
from ..core.files import BenchmarkError, write_text
from ..core.plots import LOSS, learning_rate_axis, panels, save, styles
from ..core.results import RunConfig, read_results
from ..core.settings import REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, FIGURE = "rates.md", "rates.png"
COLUMNS = 4
_LEGEND = (
    "Final held-out loss in nats per token, mean over n seeds, at equal peak learning rates. Ratio: the rate "
    "over AdamW's best. The difference is GRIT's loss minus AdamW's; below zero GRIT is ahead."
)


def title(result: Result) -> str:
    """A panel's name: the task, the model where it is not the embedded one, and the number of steps.

    Then rank and alpha where they are not the usual ones, and the batch where it is not the usual one of the
    embedded model.
    """
    config = result["config"]
    base, layers = config["base"], config["adapted_layers"]
    embedded = base == RunConfig.base
    model = "" if embedded else f", {base}" + (f" (last {layers} layers)" if layers else "")
    adapter = config["rank"], config["alpha"]
    sizes = "" if adapter == (RunConfig.rank, RunConfig.alpha) else ", r = {}, alpha = {}".format(*adapter)
    usual = not embedded or config["batch_size"] == RunConfig.batch_size
    batch = "" if usual else f", batches of {config['batch_size']}"
    return f"{config['task']}{model}, {config['steps']} steps{sizes}{batch}"


def _pair(results: Sequence[Result]) -> tuple[str, Method, Method]:
    """The panel's name, AdamW and GRIT."""
    name, found = title(results[0]), methods(results)
    reference = [method for method in found if method.optimizer == REFERENCE]
    others = [method for method in found if method.optimizer != REFERENCE]
    if len(reference) != 1 or len(others) != 1:
        names = ", ".join(method.label for method in found)
        raise BenchmarkError(f"{name}: one adamw and one other optimizer are compared here, found: {names}")
    return name, reference[0], others[0]


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
        known = [cell.loss for cell in (one, two) if cell is not None and cell.loss is not None]
        difference = f"{known[1] - known[0]:+.3f}".replace("-", "−") if len(known) == 2 else "–"
        ratio = f"{lr / best.lr:.3g}×" if best else "–"
        rows.append(f"| {lr:g} | {ratio} | {_text(one)} | {_text(two)} | {difference} |")
    return rows


def _best(method: Method) -> str:
    """The rate that ended lowest; marked where it is the lowest or highest that was tried."""
    if method.best is None:
        return "diverged"
    return f"{method.best.lr:g}" + (" (at an end)" if method.remark else "")


def _shift(reference: Method, other: Method) -> str:
    """How many factors of 2 lie between the best rates."""
    if reference.best is None or other.best is None:
        return "–"
    factors = math.log2(other.best.lr / reference.best.lr)
    return f"{factors:+.3g}".replace("-", "−") if factors else "0"


def best_rates(groups: Sequence[Sequence[Result]]) -> str:
    """The best rates of both optimizers, one row for each setting."""
    pairs = [_pair(results) for results in groups]
    one, two = pairs[0][1].label, pairs[0][2].label
    return "\n".join(
        [
            f"| setting | {one}'s best rate | loss | {two}'s best rate | loss | factors of 2 between |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {name} | {_best(a)} | {_text(a.best)} | {_best(b)} | {_text(b.best)} | {_shift(a, b)} |"
                for name, a, b in pairs
            ),
        ]
    )


def _section(results: Sequence[Result]) -> str:
    name, reference, other = _pair(results)
    header = [
        f"| learning rate | ratio | {reference.label} | {other.label} | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([f"### {name}", "", *header, *_rows(reference, other)])


def _plot(axis: Axes, results: Sequence[Result]) -> None:
    """Both optimizers over the rates; a point that would press the curves together lies above the axis."""
    name, *pair = _pair(results)
    low, high = math.inf, -math.inf
    for method, style in zip(pair, styles(), strict=False):
        points = [(cell.lr, cell.loss) for cell in method.cells if cell.loss is not None]
        axis.plot([lr for lr, _ in points], [loss for _, loss in points], label=method.label, **style)
        below = [loss for lr, loss in points if pair[0].best is None or lr <= pair[0].best.lr]
        low, high = min([low, *below]), max([high, *below])
    learning_rate_axis(axis)
    axis.tick_params(axis="x", labelsize=6.5)
    if low < high:
        axis.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axis.set_title(name, fontsize=9)
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
    groups = [results for _, results in comparable(read_results(folder), loss_setting)]
    return sorted(groups, key=lambda results: title(results[0]))


def text_of(groups: Sequence[Sequence[Result]]) -> str:
    """The Markdown of all panels, the best rates first where there are several."""
    first = [best_rates(groups)] if len(groups) > 1 else []
    return "\n\n".join([*first, *map(_section, groups), _LEGEND]) + "\n"


def report(folder: Path) -> str:
    """Write `rates.md` and `rates.png` into `folder` and print the table; returns the table."""
    groups = panels_of(folder)
    text = text_of(groups)
    write_text(folder / TABLE, text)
    path = draw(groups, folder / FIGURE)
    print(f"{text}\nwritten:\n  {folder / TABLE}\n  {path}")
    return text
