"""The table of the distances, from a results file."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..core import packing

LABELS = {
    "none": "none: the identity",
    "kfac-paper": "kfac, the paper's pairing",
    "kfac": "kfac (default)",
    "block_diagonal": "block_diagonal",
    "diagonal": "diagonal",
    "ekfac": "ekfac",
    "kfac-full": "K-FAC with both sides, for comparison",
}
STATE = {
    "none": "0", "kfac-paper": "2 r²", "kfac": "2 r²", "block_diagonal": "4 r²",
    "diagonal": "2 r² + r (d_in + d_out)",
    "ekfac": "4 r² + r (d_in + d_out)", "kfac-full": "d_in² + d_out² + 2 r²",
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """A result of `fisher-distance`."""
    return packing.read(path)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: means over sites."""
    lines = [
        "| `fisher` | distance, A | distance, B | cosine, A | cosine, B | state, floats per pair | optimizer "
        "step, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, label in LABELS.items():
        of_side = {
            side: [r for r in result["rows"] if (r["fisher"], r["side"]) == (name, side)] for side in "AB"
        }
        cells = [
            f"{statistics.fmean(row[what] for row in of_side[side]):.3f}"
            for what in ("distance", "cosine")
            for side in "AB"
        ]
        seconds = result["step_seconds"].get(name)
        cells += [STATE[name], "–" if seconds is None else f"{1e3 * seconds:.1f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
