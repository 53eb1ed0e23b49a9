"""The folder of a run: what is in it says whether it is new, unfinished or finished."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core import packing
from ..core.files import BenchmarkError, write_json
from .config import FinetuneConfig

RUN, METRICS, RECORD = "run.json", "metrics.json", "progress.json"
"""What is to be run, written first; the outcome, written last; the record that makes a checkpoint whole."""
KEPT = 2
"""Checkpoints that are kept: if writing the newest is interrupted, the one before it is whole."""
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "grit_ranks.json", "README.md")


def checkpoints(folder: Path) -> list[Path]:
    """The folder's whole checkpoints, oldest first."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{RECORD}")]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def is_finished(folder: Path) -> bool:
    """Whether the folder's run has ended."""
    return packing.exists(folder / METRICS)


def check(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to write over what is there, unless the user has said what to do with this command's own run.

    Raises:
        BenchmarkError: With the choices there are.
    """
    if resume and overwrite:
        raise BenchmarkError("--resume and --overwrite exclude each other")
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"--out {folder} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        if is_finished(folder):
            raise BenchmarkError(f"{packing.place(folder / METRICS)} is a finished run; choose another --out")
        return
    if not (folder / RUN).exists():
        raise BenchmarkError(f"{folder} is not empty and holds no run of this command; choose another --out")
    if not (resume or overwrite):
        state = "a finished run" if is_finished(folder) else "an unfinished run"
        raise BenchmarkError(
            f"{folder} holds {state}; --resume goes on with it, --overwrite deletes it, or choose another "
            "--out"
        )


def clear(folder: Path) -> None:
    """Delete what this command has written there, and nothing else."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.tmp")]:
        shutil.rmtree(path)
    for name in (METRICS, *_ADAPTER, RUN):
        (folder / name).unlink(missing_ok=True)


def begin(folder: Path, config: FinetuneConfig, fingerprints: dict[str, str], resume: bool) -> None:
    """Write down what is to be run; on a resume, check that the folder's run was this one.

    Raises:
        BenchmarkError: The run there has other settings, data or model; names them.
    """
    wanted: dict[str, Any] = {"config": asdict(config), "fingerprints": fingerprints}
    path = folder / RUN
    if not (resume and path.exists()):
        write_json(path, wanted)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differences = config.differences(found["config"])
    differences += [name for name, value in fingerprints.items() if found["fingerprints"].get(name) != value]
    if differences:
        raise BenchmarkError(
            f"{folder} holds a run of something else, which cannot be resumed so: {', '.join(differences)}; "
            "give the same arguments, or --overwrite"
        )
