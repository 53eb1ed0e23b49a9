"""Files that are either whole or absent, and the paths that everything else starts from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


class BenchmarkError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback."""


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary neighbour of `path`, then move it into place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's 0600 would follow the file into the repository
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities are an error, because JSON has none."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def sha256(parts: Iterable[str]) -> str:
    """Hex digest of strings; each is preceded by its length, so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def in_share(parts: Iterable[str], percent: int) -> bool:
    """Whether something falls into a share of so many percent, decided by the sha256 of its parts alone."""
    return int(sha256(parts)[:8], 16) % 100 < percent


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes, which need not fit in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder(given: Path | None = None) -> Path:
    """Where large things that are computed once are kept: `given`, or a folder of the user's own cache.

    Raises:
        BenchmarkError: The folder lies in the repository, where such files would be in the way.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (given or user / "grit_optim").resolve()
    if folder.is_relative_to(REPOSITORY):
        raise BenchmarkError(
            f"the cache {folder} would lie in the repository; choose a folder outside of it: --cache FOLDER"
        )
    return folder


@contextmanager
def locked(path: Path, place: int = 0, wait: bool = True) -> Iterator[bool]:
    """Hold byte `place` of a lock file against other processes; a process that ends lets go of it.

    Yields whether it is held: always, unless `wait` is false and another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True  # closing the file lets go
