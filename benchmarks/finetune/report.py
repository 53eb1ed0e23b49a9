"""The table of fine-tuning runs: each optimizer at its best learning rate, and all rates that were tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import packing
from ..core.files import BenchmarkError, write_text
from .output import METRICS

_VARIES = ("lr", "optimizer", "base", "options", "seed")


def holds(folder: Path) -> bool:
    """Whether the folder's subfolders hold runs of `train`."""
    return bool(packing.paths(folder, f"*/{METRICS}"))


def read(folder: Path) -> list[dict[str, Any]]:
    """The metrics of all runs in the folder's folders.

    Raises:
        BenchmarkError: Runs that differ in more than optimizer, learning rate and seed, or in data or model.
    """
    found = [packing.read(path) for path in packing.paths(folder, f"*/{METRICS}")]
    for metrics in found[1:]:
        ours, theirs = _shared(found[0]), _shared(metrics)
        differing = sorted(name for name in ours if ours[name] != theirs.get(name))
        if differing:
            raise BenchmarkError(
                f"the runs in {folder} differ in {', '.join(differing)}; only alike ones can be compared"
            )
    return found


def _shared(metrics: dict[str, Any]) -> dict[str, Any]:
    """Settings, data and model, which must be equal in all runs."""
    kept = {name: value for name, value in metrics["config"].items() if name not in _VARIES}
    return kept | metrics["fingerprints"]


def _method(metrics: dict[str, Any]) -> str:
    config = metrics["config"]
    options = "".join(f", {key}={value}" for key, value in sorted(config["options"].items()))
    return (
        config["optimizer"]
        + (f" over {config['base']}" if config["optimizer"].startswith("grit") else "")
        + options
    )


def _loss(runs: list[dict[str, Any]]) -> float:
    """Mean final held-out loss over the seeds; infinite if a run diverged."""
    ends = [float("inf") if run["diverged"] else run["curve"][-1]["loss"] for run in runs]
    return sum(ends) / len(ends)


def table(found: list[dict[str, Any]]) -> str:
    """A row per optimizer by the loss at its best rate; a best rate at the end of those tried is marked."""
    by_method: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for run in found:
        by_method.setdefault(_method(run), {}).setdefault(run["config"]["lr"], []).append(run)
    rows = []
    for method, by_rate in by_method.items():
        losses = {rate: _loss(runs) for rate, runs in sorted(by_rate.items())}
        best = min(losses, key=lambda rate: losses[rate])
        runs = by_rate[best]
        mark = " (at the end of the rates)" if best in (min(losses), max(losses)) else ""
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        cells = [
            method,
            f"{best:g}{mark}",
            f"{losses[best]:.4f} (n={len(runs)})",
            tried,
            f"{runs[0]['optimizer_state_bytes'] / 1e6:.2f} MB",
        ]
        rows.append((losses[best], "| " + " | ".join(cells) + " |"))
    heads = ["optimizer", "best rate", "held-out loss", "at each rate", "optimizer state"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *(row for _, row in sorted(rows))]
    return "\n".join([*lines, "", _note(found)]) + "\n"


def _note(found: list[dict[str, Any]]) -> str:
    config, first = found[0]["config"], found[0]
    weights = "NF4" if config["quantize"] == "nf4" else config["precision"]
    commits = ", ".join(sorted({str(run["code"]["commit"])[:12] for run in found}))
    examples = f"{config['steps']} steps of {config['batch_size']} × {config['accumulation']} examples"
    hardware = (
        f"{first['hardware']['gpu'] or first['hardware']['cpu']}, {first['hardware']['threads']} threads"
    )
    return (
        f"Loss in nats per answer token, mean over n seeds; before training {first['curve'][0]['loss']:.4f}. "
        f"{len(found)} runs of {examples}, model {config['model']} ({weights}), rank {config['rank']}. "
        f"{first['data']['note']}. {hardware}; commit {commits}. Step times are in the files; `cost` "
        "compares them fairly."
    )


def report(folder: Path) -> None:
    """Print the table and write it to `table.md`."""
    text = table(read(folder))
    write_text(folder / "table.md", text)
    print(text)
