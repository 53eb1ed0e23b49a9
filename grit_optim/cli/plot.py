"""``python -m grit_optim plot RUN.jsonl``: draw a run's curvature, as files. Needs matplotlib."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grit_optim.cli.figures import FIGURES, PARTS, figures_of, make
from grit_optim.cli.run_log import RunError, read_run

FORMATS = ("png", "pdf", "svg")


def add(commands: Any) -> None:
    """Add the command ``plot`` to a command line."""
    parser: argparse.ArgumentParser = commands.add_parser("plot", help="draw the figures of a run")
    parser.add_argument("run", type=Path, help="the file that optimizer.log_to(path) writes")
    parser.add_argument(
        "--out", type=Path, help="folder of the figures (default: beside the run, RUN-figures)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*FIGURES, *PARTS),
        metavar="FIGURE",
        help=f"some of: {', '.join((*FIGURES, *PARTS))}",
    )
    parser.add_argument("--format", choices=FORMATS, default="png", help="png (default), pdf or svg")
    parser.set_defaults(call=_call)


def _call(given: argparse.Namespace) -> None:
    """Draw the figures; print the files, and to stderr what was left out."""
    written, left_out = plot(given.run, given.out, given.only, given.format)
    for path in written:
        print(path)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)


def plot(
    run: str | Path, out: str | Path | None = None, only: Sequence[str] | None = None, form: str = "png"
) -> tuple[list[Path], list[str]]:
    """Draw the figures of a run.

    Args:
        run: the file that ``optimizer.log_to(path)`` wrote.
        out: folder of the figures; None for ``RUN-figures`` beside the run.
        only: names of figures, see :data:`grit_optim.cli.figures.FIGURES`; None for all that the run holds.
        form: "png", "pdf" or "svg".

    Returns:
        The files written, and for each figure left out the reason.

    Raises:
        RunError: the run cannot be read, or holds nothing for a figure in ``only``, or for any figure.
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("`plot` needs matplotlib: pip install 'grit-optim[plot]'") from error
    log = read_run(run)
    folder = Path(out) if out is not None else log.path.with_name(f"{log.path.stem}-figures")
    written, left_out = [], []
    for kind in only or figures_of(log):
        try:
            figure = make(log, kind)
        except RunError as error:
            if only:
                raise
            left_out.append(f"{kind}: {error}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{kind}.{form}")
        figure.savefig(written[-1], format=form)
    if not written:
        raise RunError(left_out[0])
    return written, left_out
