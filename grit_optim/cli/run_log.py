"""Read the file of JSON lines that ``optimizer.log_to(path)`` writes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grit_optim.sinks import Record

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


class RunError(Exception):
    """A file cannot be read as a run; the message says why and what to do."""


@dataclass(frozen=True)
class SiteName:
    """What a site's name says.

    Attributes:
        layer: number of the transformer layer, or None.
        projection: last part of the module's name, such as ``q_proj``, behind the modality in a model of
            several.
        modality: "vision", "audio", "cross_modal", "text", or None.
    """

    layer: int | None
    projection: str
    modality: str | None = None

    def __str__(self) -> str:
        return self.projection if self.layer is None else f"layer {self.layer} {self.projection}"


@dataclass
class RunLog:
    """The records of one run.

    Attributes:
        path: the file.
        start: the latest ``"start"`` record.
        steps: the ``"step"`` records in order, without those that a restart repeated.
        end: the ``"end"`` record, or None while the run goes on.
    """

    path: Path
    start: Record
    steps: list[Record] = field(default_factory=list)
    end: Record | None = None

    @property
    def sites(self) -> list[SiteName]:
        """The sites, in the order of every column."""
        return [parse_name(s["name"], s["adapter"], s.get("modality")) for s in self.start["sites"]]

    def having(self, column: str) -> list[Record]:
        """The steps that hold a column of the sites' numbers.

        Raises:
            RunError: none does.
        """
        found = [step for step in self.steps if column in step["sites"]]
        if not found:
            raise RunError(
                f"{self.path} holds no {column}; "
                f"{_REMEDIES.get(column, 'nothing was recorded of it in this run')}"
            )
        return found


_SPECTRUM = "record with optimizer.log_to(path, log_fisher_spectrum=True)"
_VECTORS = "record with optimizer.log_to(path, log_eig_heatmaps=True)"
_REMEDIES = {
    "eigenvalues_a": _SPECTRUM,
    "eigenvalues_g": _SPECTRUM,
    "eigenvectors_a": _VECTORS,
    "eigenvectors_g": _VECTORS,
    "angle_A": "only the modes 'spectral', 'steer' and 'inverse' know the step without curvature",
}
"""What to do about a column that a run does not hold."""


def parse_name(name: str, adapter: str, modality: str | None = None) -> SiteName:
    """Layer and projection from a site's name, which ends in the adapter's."""
    module = name.removesuffix(f".{adapter}") if adapter else name
    found = _LAYER.search(f"{module}.")
    projection = module.rsplit(".", 1)[-1]
    number = int(found[1]) if found else None
    return SiteName(number, f"{modality} {projection}" if modality else projection, modality)


def by_modality(run: RunLog) -> dict[str, list[int]]:
    """Positions of the sites of each part of a multimodal model, by its modality."""
    found: dict[str, list[int]] = {}
    for i, site in enumerate(run.sites):
        if site.modality is not None:
            found.setdefault(site.modality, []).append(i)
    return found


def read_run(path: str | Path) -> RunLog:
    """Read a run, also one that is still being written.

    Raises:
        RunError: the file cannot be read, a line is no record, or there is no start record.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    run: RunLog | None = None
    whole = text[: text.rfind("\n") + 1]  # a last line without its end is still being written
    for number, line in enumerate(whole.splitlines(), 1):
        record = _record(path, number, line)
        if record["kind"] == "start":
            run = _started(run, RunLog(path, record))
        elif run is None:
            raise RunError(
                f"{path} does not begin with a start record; pass a file that optimizer.log_to(path) wrote"
            )
        elif record["kind"] == "step":
            run.steps.append(record)
        else:
            run.end = record
    if run is None:
        raise RunError(f"{path} holds no record yet; wait, or pass a file that optimizer.log_to(path) wrote")
    return run


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    """The record in a line of the file.

    Raises:
        RunError: the line holds none.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RunError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("kind") not in ("start", "step", "end"):
        raise RunError(f"{path}, line {number} is no record of optimizer.log_to(path)")
    if record["kind"] == "start" and (lacking := [key for key in ("options", "sites") if key not in record]):
        raise RunError(f"{path}, line {number} is a start record without {' and '.join(lacking)}")
    return record


def _started(before: RunLog | None, run: RunLog) -> RunLog:
    """The run that starts, with the earlier steps of a run on equal sites that it goes on from."""
    if before is not None and before.start["sites"] == run.start["sites"]:
        run.steps = [step for step in before.steps if step["step"] <= run.start["step"]]
    return run
