"""The documentation of the options, from what is declared."""

from __future__ import annotations

import textwrap
from dataclasses import Field, fields

from grit_optim.options.combined import DECLARED, GROUPS

HEADINGS = {
    "PreconditionOptions": "The step",
    "CurvatureOptions": "The Fisher information",
    "CaptureOptions": "What is recorded",
    "ScheduleOptions": "When",
    "RankOptions": "Ranks",
    "PenaltyOptions": "Penalties",
}
_INTRODUCTION = """# Options

Keywords of `GritOptimizer(base, model, …)`. None has to be set. `python -m grit_optim options` prints
this page.

`presets.PAPER` and `presets.PAPER_LONG_RUN` hold every default of the GRIT library (arXiv 2601.00231)
under these names. Former names of options are still taken where they mean something
([migration](migration.md)).
"""


def arguments() -> str:
    """The options as entries of a docstring's ``Args:``."""
    lines = [
        textwrap.fill(
            f"{name}: {known.metadata['meaning']}", 110, initial_indent=" " * 4, subsequent_indent=" " * 8
        )
        for name, known in DECLARED.items()
    ]
    return "\n".join(lines)


def markdown() -> str:
    """The page docs/options.md."""
    parts = [_INTRODUCTION]
    for kind in GROUPS:
        parts.append(f"## {HEADINGS[kind.__name__]}\n\n{kind.__doc__}\n")
        rows = [_row(known) for known in fields(kind)]
        parts.append("\n".join(["| option | default | what it is |", "| --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _row(known: Field[object]) -> str:
    default = f'"{known.default}"' if isinstance(known.default, str) else known.default
    meaning = known.metadata["meaning"].replace("|", "\\|")
    return f"| `{known.name}` | `{default}` | {meaning} |"
