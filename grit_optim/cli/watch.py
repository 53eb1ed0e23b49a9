"""``python -m grit_optim watch RUN.jsonl``: show a run in the terminal while it is written. Needs rich."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_optim.cli.run_log import RunLog, by_modality, read_run

if TYPE_CHECKING:
    from rich.console import RenderableType

BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = {
    "rank kept": "rank",
    "eff. rank Σ_a": "effective_rank_a",
    "eff. rank Σ_g": "effective_rank_g",
    "cond. Σ_a": "condition_a",
    "cond. Σ_g": "condition_g",
    "angle A (°)": "angle_A",
    "angle B (°)": "angle_B",
}
"""Headings of the table, and the columns of a record that they show."""


def add(commands: Any) -> None:
    """Add the command ``watch`` to a command line."""
    parser: argparse.ArgumentParser = commands.add_parser("watch", help="follow a run in the terminal")
    parser.add_argument("run", type=Path, help="the file that optimizer.log_to(path) writes")
    parser.add_argument("--once", action="store_true", help="show the state once and end")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="time between two looks (default 1)"
    )
    parser.set_defaults(call=lambda given: watch(given.run, given.once, given.interval))


def watch(path: Path, once: bool = False, interval: float = 1.0) -> None:
    """Show a run until it ends or the user stops it. Waits for a file that is not there yet.

    Args:
        path: the run's file.
        once: show the run as it is and return.
        interval: seconds between two looks.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise ImportError("`watch` needs rich: pip install 'grit-optim[watch]'") from error
    console = Console()
    if once:
        console.print(dashboard(read_run(path)))
        return
    with Live(f"waiting for {path}", console=console, auto_refresh=False) as live:
        try:
            while not _shown(live, path):
                time.sleep(interval)
        except KeyboardInterrupt:
            pass


def _shown(live: Any, path: Path) -> bool:
    """Show the run as it is now.

    Returns:
        Whether it has ended.
    """
    if not path.exists() or not path.stat().st_size:
        return False
    run = read_run(path)
    live.update(dashboard(run), refresh=True)
    return run.end is not None


def dashboard(run: RunLog) -> RenderableType:
    """A panel of loss, ranks, engaged sites, schedule and time, with a table of the factors by projection."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    if not run.steps:
        return Panel(f"{len(run.start['sites'])} sites, no step yet", title=str(run.path))
    last, options = run.steps[-1], run.start["options"]
    facts = Table.grid(padding=(0, 2))
    for name, value in summary(run).items():
        facts.add_row(f"[bold]{name}", value)
    projections: dict[str, list[int]] = {}
    for i, site in enumerate(run.sites):
        projections.setdefault(site.projection, []).append(i)
    tables = []
    for heading, rows in (("modality", by_modality(run)), ("projection", projections)):
        if rows:
            tables.append(Table(heading, "sites", *_COLUMNS))
        for name, members in rows.items():
            cells = [_median(last["sites"].get(column), members) for column in _COLUMNS.values()]
            tables[-1].add_row(name, str(len(members)), *cells)
    mode = f"{options['precondition']} · fisher {options['fisher']} · {run.start['base']}"
    state = "ended" if run.end is not None else "running"
    return Panel(
        Group(facts, *tables), title=f"{run.path.name} · step {last['step']} · {state}", subtitle=mode
    )


def summary(run: RunLog) -> dict[str, str]:
    """The run's totals at its latest step, as short text by name."""
    last, sites = run.steps[-1], run.start["sites"]
    losses = [step["loss"] for step in run.steps if step["loss"] is not None]
    ranks = last["sites"]["rank"]
    mean, full = statistics.fmean(ranks), statistics.fmean(site["rank"] for site in sites)
    refreshes = f"{last['refreshes']}, every {last['kfac_update_freq']} steps"
    reprojections = f"{last['reprojections']}, every {last['reprojection_freq']} steps"
    shares = {name: share for name, share in time_shares(last).items() if name != "base"}
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share >= 0.001)
    return {
        "loss (nats per token)": f"{losses[-1]:.4g}  {sparkline(losses)}"
        if losses
        else "not told: call optimizer.observe(loss)",
        "engaged sites": f"{int(last['engaged_sites'])} of {len(sites)}",
        "ranks": f"{min(ranks)} to {max(ranks)}, mean {mean:.1f} of {full:.1f}",
        "refreshes": f"{refreshes}, damping {last['kfac_damping']:.3g}",
        "reprojections": reprojections if run.start["options"]["reprojection"] != "none" else "off",
        "statistics dropped": str(int(last["dropped_folds"])),
        "time share of GRIT": f"{sum(shares.values()):.1%} of {last['seconds']:.0f} s ({parts})",
    }


def time_shares(step: dict[str, Any]) -> dict[str, float]:
    """Host seconds per stage as shares of the wall-clock time since the optimizer was built."""
    total = max(step["seconds"], 1e-9)
    return {name: seconds / total for name, seconds in step["stage_seconds"].items()}


def sparkline(values: list[float], width: int = 40) -> str:
    """The last values as bars of eight heights, the lowest value lowest."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def _median(column: list[Any] | None, members: list[int]) -> str:
    """Median over some sites as text; a dash without numbers."""
    values = [column[i] for i in members if column[i] is not None] if column else []
    return f"{statistics.median(values):.3g}" if values else "–"
