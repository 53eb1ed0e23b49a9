"""Write records as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Sink = Callable[[Record], object]


class JsonLines:
    """Appends one line per record to a file, so that a resumed run goes on in it.

    Drops a last line without an end, which a killed process leaves.

    Args:
        path: the file. Missing folders are made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_broken_line(self.path)
        self._file = self.path.open("a", encoding="utf8")

    def __call__(self, record: Record) -> None:
        """Write a line, and flush it."""
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
