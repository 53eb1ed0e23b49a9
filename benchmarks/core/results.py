"""One JSON file per run, packed with the others or not: its name, its writing, its reading."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import packing
from .files import BenchmarkError, sha256, write_json

FORMAT = 1
PRECISIONS = ("fp32", "bf16")  # bf16: frozen weights in it, autocast of the rest, adapters in fp32
_REQUIRED = (
    "config",
    "curve",
    "diverged",
    "fingerprint",
    "hardware",
    "seconds",
    "step_seconds_median",
    "versions",
)


_LATER = ("base", "adapted_layers")  # settings that came after the first results were named


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's outcome on given data, model and code.

    Attributes:
        base: the base model's name: "embedded", "smollm2", the hub's id, or a folder's own name.
        adapted_layers: only so many of the last decoder layers have adapters; None: all.
    """

    task: str
    optimizer: str
    lr: float
    seed: int
    steps: int = 60
    batch_size: int = 48
    rank: int = 16
    alpha: int = 16
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup: int = 5
    eval_every: int = 15
    device: str = "cpu"
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    base: str = "embedded"
    adapted_layers: int | None = None

    def file_name(self) -> str:
        """A name that people can read, ended by a hash of the whole configuration.

        The settings that the first results did not have count where they are not at their defaults.
        """
        known = asdict(self)
        settings = {
            name: value
            for name, value in known.items()
            if name not in _LATER or value != getattr(RunConfig, name)
        }
        digest = sha256([json.dumps(settings, sort_keys=True)])[:10]
        return f"{self.task}-{self.optimizer}-lr{self.lr:g}-seed{self.seed}-{digest}.json"


_DEFAULTS = asdict(RunConfig("", "", 0.0, 0))


def finite(value: float) -> float | None:
    """The value, or None (JSON's null) where it is infinite or not a number."""
    return value if math.isfinite(value) else None


def write_result(folder: Path, result: dict[str, Any]) -> Path:
    """Write a run's result atomically under its configuration's name."""
    path = folder / RunConfig(**result["config"]).file_name()
    write_json(path, {"format": FORMAT, **result})
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Read one result; an error names the file and what is wrong with it.

    Settings that it does not name are younger than it, and get the defaults that it was made with.
    """
    try:
        result = packing.read(path)
    except ValueError as error:
        raise BenchmarkError(f"{path} is no JSON ({error}); delete it and run again") from error
    missing = [key for key in _REQUIRED if not isinstance(result, dict) or key not in result]
    if missing:
        raise BenchmarkError(
            f"{packing.place(path)} is no result of a run: {', '.join(missing)} missing; "
            "move it out of the folder"
        )
    if result.get("format") != FORMAT:
        raise BenchmarkError(
            f"{packing.place(path)} has format {result.get('format')}, this program reads {FORMAT}; run again"
        )
    result["config"] = {**_DEFAULTS, **result["config"]}
    return result


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, sorted by file name."""
    results = [read_result(path) for path in packing.paths(folder, "*-seed*.json")]
    if not results and not folder.is_dir():
        raise BenchmarkError(f"no such folder: {folder}; run first: python -m benchmarks run --out {folder}")
    if not results:
        raise BenchmarkError(f"no results in {folder}; run first: python -m benchmarks run --out {folder}")
    return results


def is_done(folder: Path, config: RunConfig, fingerprint: str) -> bool:
    """Whether the folder already holds this very run; an error if it holds it with other data or model."""
    path = folder / config.file_name()
    if not packing.exists(path):
        return False
    found = read_result(path)
    if found["config"] != asdict(config):
        raise BenchmarkError(
            f"{packing.place(path)} holds another configuration than its name says; "
            "move it away and run again"
        )
    if found["fingerprint"] != fingerprint:
        raise BenchmarkError(
            f"{packing.place(path)} was run on other data or another base model (fingerprint "
            f"{found['fingerprint'][:12]}, now {fingerprint[:12]}); choose another --out, or delete it"
        )
    return True
