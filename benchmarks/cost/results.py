"""What every cost file holds besides its numbers, and how a measurement is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import environment
from ..core.files import write_json
from ..training.optimizers import package_version


def surroundings(optimizer: str, device: str, load: float) -> dict[str, Any]:
    """What a result depends on besides its settings."""
    return {
        "versions": environment.versions(),
        "optimizer_package": package_version(optimizer),
        "code": environment.commit(),
        "hardware": {**environment.hardware(device), "load_average_before": load},
    }


def write(result: dict[str, Any], path: Path) -> None:
    """Write a measurement, and print it as a table."""
    write_json(path, result)
    show(result)
    print(f"written: {path}")


def show(result: dict[str, Any]) -> None:
    """Print a measurement: step times and state of both optimizers, their ratio, and the stages."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    what = f"task {result['task']}" if result.get("task") else result["model"]
    table = Table("", "step, ms (quartiles)", "optimizer state", title=f"full training steps, {what}")
    for name, times in result["step_seconds"].items():
        spread = f"{1e3 * times['median']:.1f} ({1e3 * times['q1']:.1f} to {1e3 * times['q3']:.1f})"
        who = result["optimizer"] if name == "optimizer" else name
        table.add_row(who, spread, f"{result['optimizer_state_bytes'][name]:,} bytes")
    console.print(table)
    ratio = result["ratio"]
    console.print(
        f"step by step: {ratio['median']:.3f}× (quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f}); "
        f"all steps together: {result['ratio_of_totals']:.3f}×"
    )
    if result["stage_seconds_per_step"]:
        table = Table("stage, ms", "host, mean of a step", "device")
        on_device = result.get("stage_device_seconds", {})
        for name, seconds in result["stage_seconds_per_step"].items():
            device = f"{1e3 * on_device[name]:.2f}" if name in on_device else "–"
            table.add_row(name, f"{1e3 * seconds:.2f}", device)
        console.print(table)
