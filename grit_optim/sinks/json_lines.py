"""Write records as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grit_optim.messages import warn

try:
    import fcntl
except ImportError:  # Windows: two writers of one file are not noticed
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]
Sink = Callable[[Record], object]

_BEGINNINGS = tuple(f'{{"kind": "{kind}"'.encode() for kind in ("start", "step", "end"))
"""How each line of a log begins."""


class JsonLines:
    """Appends one line per record to a file, so that a resumed run goes on in it.

    Drops a last record that was cut off, which a killed process leaves. Warns where another process, or
    another sink of this one, is writing the file.

    Args:
        path: the file: a new or an empty one, or an earlier log. Missing folders are made.

    Raises:
        ValueError: the file holds something that is no log. It is left as it is.
        IsADirectoryError: it is a folder.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(
                f"{self.path} is a folder; a log is a file: pass {self.path / 'grit.jsonl'}"
            )
        _check_log(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf8")
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def _begin(self) -> None:
        """Bring the file to the end of a line."""
        if not self.path.is_file():  # a device, such as /dev/null
            return
        if _lock(self._file.fileno()):
            _end_last_line(self.path)
            return
        warn(
            f"{self.path} is being written by another process, or by another optimizer that has not been "
            "closed. Their records will stand among this one's, and no reader can tell them apart. Log to "
            "one file per run, and from one process alone"
        )

    def __call__(self, record: Record) -> None:
        """Write a line, and flush it."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lock(handle: int) -> bool:
    """Hold the file's lock until the handle is closed; True also where there are no locks.

    Returns:
        False where another handle holds it.
    """
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
    return True


def _check_log(path: Path) -> None:
    """Refuse a file that is no log.

    Raises:
        ValueError: its first line is no record, or its last one neither that nor the beginning of one.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        last = first = file.readline()
        for line in file:
            last = line
    sound_start = _begins_as_a_record(first) and (_is_whole(first) or not first.endswith(b"\n"))
    empty = not last.strip(b"\0")  # what a machine that lost its power may leave behind the last line
    sound_end = last.endswith(b"\n") or _begins_as_a_record(last) or _is_whole(last) or empty
    if not (sound_start and sound_end):
        where, line = ("ends", last) if sound_start else ("begins", first)
        raise ValueError(
            f"{path} exists and is no log of GRIT's: it {where} with {line[:40]!r}. Nothing was written; log "
            "to another file"
        )


def _begins_as_a_record(line: bytes) -> bool:
    """Whether a line is a record, or may be what a killed process or machine has left of one."""
    start = line.rstrip(b"\0")
    return not line or any(start and known.startswith(start[: len(known)]) for known in _BEGINNINGS)


def _end_last_line(path: Path) -> None:
    """Cut off a last record that is not whole, and end a whole one that lacks its line's end."""
    text = path.read_bytes()
    last = text[text.rfind(b"\n") + 1 :]
    if not last:
        return
    with path.open("rb+") as file:
        if _is_whole(last):
            file.seek(0, 2)
            file.write(b"\n")
        else:
            file.truncate(len(text) - len(last))


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
