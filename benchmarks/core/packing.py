"""The results of a study in one file, `runs.jsonl.gz`, read together with results in files of their own.

A study that runs writes one JSON file per run, a working file. `pack` moves the working files of a study
into its packed file: one JSON object per line, `{"name": ..., "result": ...}`, sorted by name. The name is
the path that the working file had in the study's folder (`a.json`, or `part/a.json`). Readers call `paths`,
`exists` and `read`, which find both kinds. A working file counts before a packed result of the same name.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from .files import BenchmarkError, write_json, write_with

PACKED = "runs.jsonl.gz"
_ORIGIN = {"versions", "code"}
"""What every result states of its origin, and no settings, table or note of a failure does."""


def _damaged(packed: Path, what: str) -> BenchmarkError:
    return BenchmarkError(
        f"{packed} {what}; restore the file (git checkout), or delete it and run the study again"
    )


def _parse(packed: Path, data: bytes) -> dict[str, str]:
    """The lines of a packed file by the names of their results; an error says which line is wrong."""
    try:
        lines = gzip.decompress(data).decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _damaged(packed, f"is damaged ({error})") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise _damaged(packed, f"is damaged: line {number} is no JSON ({error})") from error
        if not isinstance(entry, dict) or entry.keys() != {"name", "result"}:
            raise _damaged(packed, f"was not written by `pack`: line {number} is no name with a result")
        name = entry["name"]
        if not isinstance(name, str) or not 1 <= name.count("/") + 1 <= 2 or ".." in name.split("/"):
            raise _damaged(packed, f"was not written by `pack`: line {number} has the name {name!r}")
        if name in found:
            raise _damaged(packed, f"is damaged: line {number} repeats the name {name}")
        found[name] = line
    return found


@lru_cache(maxsize=8)
def _parsed(packed: Path, modified_ns: int, inode: int) -> Mapping[str, str]:
    """The lines of a packed file, parsed once as long as the file does not change."""
    return _parse(packed, packed.read_bytes())


def _lines(packed: Path) -> Mapping[str, str]:
    """The lines of a packed file by name; none where there is no file."""
    try:
        status = packed.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _parsed(packed, status.st_mtime_ns, status.st_ino)


def _studies(folder: Path) -> Iterator[tuple[Path, str]]:
    """The folder's packed file and its parent's, with what the names of the folder's results begin with."""
    yield folder / PACKED, ""
    if folder.name not in ("", ".."):
        yield folder.parent / PACKED, f"{folder.name}/"


def _find(path: Path) -> tuple[Path, str] | None:
    """The packed file that holds a result, and the result's line."""
    for packed, start in _studies(path.parent):
        if line := _lines(packed).get(start + path.name):
            return packed, line
    return None


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def paths(folder: Path, pattern: str) -> list[Path]:
    """Sorted paths of the results in a folder that match a pattern; `read` takes those of packed ones too."""
    found = set(folder.glob(pattern))
    for packed, start in _studies(folder):
        names = (name[len(start) :] for name in _lines(packed) if name.startswith(start))
        found |= {folder / name for name in names if _matches(name, pattern)}
    return sorted(found)


def exists(path: Path) -> bool:
    """Whether there is a result of that path, as a file or packed."""
    return path.exists() or _find(path) is not None


def read(path: Path) -> Any:
    """The JSON value of a result, from its own file or, where there is none, from the packed one.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: Its own file is no JSON.
        BenchmarkError: The packed file is damaged.
    """
    if path.exists() or (found := _find(path)) is None:
        return json.loads(path.read_text(encoding="utf-8"))
    return json.loads(found[1])["result"]


def place(path: Path) -> str:
    """A result's place for messages; for a packed one also the command that makes a file of it."""
    if path.exists() or (found := _find(path)) is None:
        return str(path)
    return f"{path} (in {found[0]}; `python -m benchmarks unpack {found[0].parent}` makes a file of it)"


def _line(name: str, value: Any) -> str:
    entry = {"name": name, "result": value}
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(
            f"{path} is no JSON ({error}); move it out of the folder, then pack again"
        ) from error


def _is_result(path: Path) -> bool:
    if path.suffix != ".json" or not path.is_file():
        return False
    value = _load(path)
    return isinstance(value, dict) and value.keys() >= _ORIGIN


def _working_files(folder: Path) -> dict[str, Path]:
    """Working files by name: those in the folder, and those in subfolders that hold nothing else.

    A fine-tuning run's folder with an adapter beside its metrics is left as it is.
    """
    found = [path for path in sorted(folder.glob("*.json")) if _is_result(path)]
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        inside = sorted(part.iterdir())
        if all(map(_is_result, inside)):
            found += inside
    return {path.relative_to(folder).as_posix(): path for path in found}


def _write(packed: Path, lines: Mapping[str, str]) -> None:
    """Write a packed file, atomically; equal results give equal bytes."""

    def write(temporary: Path) -> None:
        """Write, flush to the disk and read back: the working files are deleted next."""
        with temporary.open("wb") as file:
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as stream:
                stream.writelines(f"{lines[name]}\n".encode() for name in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        if _parse(packed, temporary.read_bytes()) != lines:
            raise BenchmarkError(f"{packed} does not read back as it was written; nothing was changed")

    write_with(packed, write)


def pack(folder: Path) -> int:
    """Move a study's working files into its packed file; returns how many.

    The packed file is complete and read back before the first working file is deleted. After an
    interruption, call `pack` again.

    Raises:
        BenchmarkError: There is no such folder, a file is damaged, a subfolder is packed by itself, or a
            working file changed meanwhile.
    """
    if not folder.is_dir():
        raise BenchmarkError(f"no such folder: {folder}")
    if inner := next(folder.glob(f"*/{PACKED}"), None):
        raise BenchmarkError(f"{folder} holds packed studies ({inner}); pack each study's own folder")
    packed, working = folder / PACKED, _working_files(folder)
    if not working:
        return 0
    lines = {**_lines(packed), **{name: _line(name, _load(path)) for name, path in working.items()}}
    _write(packed, lines)
    for name, path in working.items():
        if _line(name, _load(path)) != lines[name]:
            raise BenchmarkError(f"{path} changed while it was packed; pack again when no study runs there")
        path.unlink()
    for part in {path.parent for path in working.values()} - {folder}:
        with suppress(OSError):  # a study that runs has written another file there
            part.rmdir()
    return len(working)


def unpack(folder: Path) -> int:
    """Make working files of a study's packed results and delete the packed file; returns how many it held.

    Raises:
        BenchmarkError: There is no packed file, or it is damaged.
    """
    packed = folder / PACKED
    if not packed.exists():
        raise BenchmarkError(f"nothing is packed in {folder}: it has no {PACKED}")
    lines = _lines(packed)
    for name, line in lines.items():
        if not (folder / name).exists():
            write_json(folder / name, json.loads(line)["result"])
    packed.unlink()
    return len(lines)
