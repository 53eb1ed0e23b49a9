"""Where records go: a file of JSON lines, TensorBoard, Weights & Biases. Any callable that takes a dict is a sink too.

A record's ``kind`` is ``"start"`` (options and sites, once per run), ``"step"`` or ``"end"`` (final ranks);
docs/telemetry.md lists what each holds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Sink = Callable[[Record], object]


class JsonLines:
    """One record per line, appended to a file, so that a resumed run goes on in it.

    A last line that was cut off, as when a process is killed, is dropped.

    Args:
        path: the file; missing folders are made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_broken_line(self.path)
        self._file = self.path.open("a", encoding="utf8")

    def __call__(self, record: Record) -> None:
        """Write a line; it is in the file when this returns."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_broken_line(path: Path) -> None:
    """Cut a file back to the end of its last whole line."""
    if path.is_file() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(text.rfind(b"\n") + 1)


class TensorBoard:
    """Scalars for TensorBoard (needs the package ``tensorboard``).

    Args:
        log_dir: folder of the event files.
        per_site: also every site's own numbers, under ``Fisher/<site>/``; else only medians and ranges over
            the sites.
    """

    def __init__(self, log_dir: str | Path, per_site: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir))
        self._flatten = Flattener(per_site)

    def __call__(self, record: Record) -> None:
        """Add the record's scalars."""
        for name, value in self._flatten(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandB:
    """Scalars for Weights & Biases (needs the package ``wandb``).

    Args:
        run: a run, or None for the current one; without a current one, one is started with ``settings``.
        per_site: as in :class:`TensorBoard`.
        settings: for ``wandb.init``, such as ``project="GRIT", mode="offline"``.
    """

    def __init__(self, run: Any = None, per_site: bool = False, **settings: Any) -> None:
        import wandb

        self._own = run is None and wandb.run is None
        self.run = run or wandb.run or wandb.init(**settings)
        self._flatten = Flattener(per_site)

    def __call__(self, record: Record) -> None:
        """Log the record's scalars; the options go to the run's configuration.

        The steps are logged as ``GRIT/step``, so that they may differ from those that a trainer logs in the
        same run.
        """
        if record["kind"] == "start":
            self.run.config.update({"grit": record["options"]}, allow_val_change=True)
        elif scalars := self._flatten(record):
            self.run.log({"GRIT/step": record["step"], **scalars})

    def close(self) -> None:
        """End the run if it was started here."""
        if self._own:
            self.run.finish()


class Flattener:
    """Records as ``{tag: number}``: totals under ``GRIT/``, sites under ``Fisher/<site>/``.

    Args:
        per_site: every site's own numbers too.
    """

    def __init__(self, per_site: bool) -> None:
        self.per_site = per_site
        self._names: list[str] = []

    def __call__(self, record: Record) -> dict[str, float]:
        """The record's finite numbers."""
        if record["kind"] == "start":
            self._names = [site["name"] for site in record["sites"]]
            return {}
        if record["kind"] == "end":
            found = [
                (name, key, value) for name, site in record["final"].items() for key, value in site.items()
            ]
            return {f"Fisher/{name}/{key}": float(value) for name, key, value in found if _is_number(value)}
        flat = {f"GRIT/{name}": float(value) for name, value in record.items() if _is_number(value)}
        flat.update({f"GRIT/seconds/{name}": value for name, value in record["stage_seconds"].items()})
        for name, column in record["sites"].items():
            numbers = [value for value in column if _is_number(value)]
            if numbers:
                spread = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
                flat.update({f"GRIT/{name}/{which}": float(value) for which, value in spread.items()})
            if self.per_site:
                flat.update(self._of_sites(name, column))
        return flat

    def _of_sites(self, name: str, column: list[Any]) -> dict[str, float]:
        """One quantity of every site; eigenvalues one by one, counted from 0."""
        flat = {}
        for site, value in zip(self._names, column, strict=False):
            if _is_number(value):
                flat[f"Fisher/{site}/{name}"] = float(value)
            elif name.startswith("eigenvalues") and value is not None:
                flat.update(
                    {f"Fisher/{site}/eig_{name[-1]}_{i}": v for i, v in enumerate(value) if _is_number(v)}
                )
        return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
