"""Table and figures from the JSON files of a folder, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.files import write_text
from ..core.results import read_results
from .figures import draw
from .summary import (
    Cell,
    Method,
    Result,
    Row,
    comparable,
    described_model,
    methods,
    reference_cell,
    rows,
    sections,
)

_HEADER = (
    "optimizer",
    "best learning rate",
    "held-out loss (nats/token)",
    "loss on unseen batches",
    "exact match",
    "steps to AdamW's best",
    "seconds to AdamW's best",
    "step time",
    "optimizer state",
)
_LEGEND = (
    "Loss: mean over n seeds at the best learning rate, ± the standard deviation between seeds. Steps and "
    "seconds to AdamW's best: the first point of the mean held-out curve, interpolated, at AdamW's best "
    "final loss, as a ratio to AdamW. Step time: median, as a ratio to AdamW; the runs came one after "
    "another, so on a noisy machine `cost`, which takes turns, is the one to trust, for the seconds too. "
    "Loss on unseen batches: of every training batch before it is trained on, mean over the steps after the "
    "first held-out point; the batches are the same for all and no example comes twice, so this is held out "
    "too, but from the training packages."
)


def _rate(method: Method, best: Cell | None) -> str:
    if best is None:
        return f"none of {', '.join(f'{cell.lr:g}' for cell in method.cells)}"
    return f"{best.lr:g}" + (f" ({method.remark})" if method.remark else "")


def _loss(best: Cell | None) -> str:
    if best is None or best.loss is None:
        return "diverged"
    spread = "" if best.spread is None else f" ± {best.spread:.3f}"
    return f"{best.loss:.3f}{spread} (n={len(best.finished)})"


def _times(ratio: float | None, reached: bool = True) -> str:
    if ratio is None:
        return "–" if reached else "not reached"
    return f"{ratio:.2f}×"


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def _fields(row: Row, has_reference: bool) -> tuple[str, ...]:
    best, missing = row.best, not has_reference or row.best is None
    return (
        row.method.label,
        _rate(row.method, best),
        _loss(best),
        "–" if best is None or best.unseen_loss is None else f"{best.unseen_loss:.3f}",
        f"{100 * best.mean('exact_match'):.1f} %" if best else "–",
        _times(row.steps_ratio, missing),
        _times(row.seconds_ratio, missing),
        _times(row.step_time_ratio),
        _size(best.mean("optimizer_state_bytes")) if best else "–",
    )


def _diverged(found: Sequence[Method]) -> list[str]:
    """A line for every cell with diverged runs."""
    return [
        f"- {method.label} at {cell.lr:g}: {cell.diverged} of {len(cell.runs)} runs diverged"
        for method in found
        for cell in method.cells
        if cell.diverged
    ]


def _origin(results: Sequence[Result]) -> str:
    """One line on where the numbers come from."""
    first = results[0]
    hardware, config = first["hardware"], first["config"]
    device = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    code = sorted({(result.get("code") or {}).get("commit") or "unknown" for result in results})
    dirty = (
        " (with uncommitted changes)"
        if any((result.get("code") or {}).get("dirty") for result in results)
        else ""
    )
    base = described_model(config["base"], config["adapted_layers"])
    return (
        f"{len(results)} runs of {config['steps']} steps of {config['batch_size']} examples, task "
        f"{config['task']}, {base}, data {first['fingerprint'][:12]}; {device}; commit "
        f"{', '.join(name[:12] for name in code)}{dirty}."
    )


def table(results: Sequence[Result]) -> str:
    """Markdown table of comparable results, with the diverged runs and the origin below it."""
    found = methods(results)
    has_reference = reference_cell(found) is not None
    lines = [" | ".join(_HEADER), " | ".join("---" for _ in _HEADER)]
    lines += [" | ".join(_fields(row, has_reference)) for row in rows(found)]
    parts = ["\n".join(f"| {line} |" for line in lines), *filter(None, ["\n".join(_diverged(found))])]
    if not has_reference:
        parts.append("No finished adamw run here: nothing to take ratios to.")
    return "\n\n".join([*parts, _LEGEND, _origin(results)])


def report(folder: Path) -> str:
    """Write `table.md` and the figures into `folder` and print the table; returns the table.

    Runs that differ in data, model, hardware, versions or length never share a table: each such group gets
    its own, headed by what it differs in.
    """
    parts, figures = list[str](), list[Path]()
    for above, results, ending in sections(comparable(read_results(folder))):
        parts += [*above, table(results)]
        figures += draw(methods(results), folder, ending)
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "table.md", text)
    print(text)
    print("\n".join(["written:", f"  {folder / 'table.md'}", *(f"  {path}" for path in figures)]))
    return text
