"""Folders for the time of a write, which later processes recognise once their own has been killed.

The process that writes holds a lock on its folder. The system lets go of it however the process ends, so a
folder whose lock is free is nobody's any more.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, so nothing is ever removed
    fcntl = None  # type: ignore[assignment]

_DAY = 24 * 3600
"""Seconds without a change after which another machine's folder is abandoned: it may not see our locks."""
_LONGEST = 180
"""Bytes of a name to which ours add up to 60; file systems allow 255."""


@contextmanager
def folder(place: Path, name: str) -> Iterator[Path]:
    """A new, empty, locked folder in ``place``, hidden and named after ``name``; removed at the end."""
    new, lock = _locked(place, label(name))
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def label(name: str) -> str:
    """``name``, or where it is so long that nothing could be added to it, a short one made of it."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else hashlib.sha256(encoded).hexdigest()[:32]


def _locked(place: Path, name: str) -> tuple[Path, int | None]:
    """A new folder, and the handle that holds its lock; None where the file system has no locks."""
    while True:
        new = place / f".{name}.{_host()}-{uuid.uuid4().hex}.tmp"
        new.mkdir()
        try:
            lock = _lock(new)
        except FileNotFoundError:
            continue  # taken for abandoned, and removed, before it was locked
        except OSError:
            return new, None
        if lock is not None and _is_at(lock, new):
            return new, lock
        if lock is not None:  # removed just before
            os.close(lock)


def remove_abandoned(place: Path, name: str) -> bool:
    """Remove the folders of :func:`folder` whose process has ended.

    Returns:
        Whether there is one whose process may be at work.
    """
    pattern = re.compile(rf"\.{re.escape(label(name))}\.(?:([0-9a-f]{{8}})-)?[0-9a-f]{{32}}\.tmp")
    at_work = False
    for entry in place.iterdir():
        found = pattern.fullmatch(entry.name)
        if found is None or entry.is_symlink() or not entry.is_dir():
            continue
        try:
            ours = found[1] == _host() or _untouched(entry)
            lock = _lock(entry) if ours and owned({entry}) else None
        except OSError:  # gone meanwhile, not ours to open, or no locks here
            lock = None
        if lock is None:
            at_work = True
            continue
        try:
            shutil.rmtree(entry, ignore_errors=True)
        finally:
            os.close(lock)
    return at_work


def owned(entries: Iterable[Path]) -> bool:
    """Whether all of them belong to the user that this process runs as."""
    return not hasattr(os, "geteuid") or {e.lstat().st_uid for e in entries} <= {os.geteuid()}


def _lock(path: Path) -> int | None:
    """A handle that holds the folder's lock; None if another holds it.

    Raises:
        OSError: the folder cannot be opened, or there are no locks here.
    """
    if fcntl is None:
        raise OSError("this system has no locks")
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open folder is the one that lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _untouched(path: Path) -> bool:
    """Whether nothing in the folder has changed for a day."""
    latest = max(entry.lstat().st_mtime for entry in (path, *path.iterdir()))
    return time.time() - latest > _DAY


def _host() -> str:
    """This machine, in eight digits."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
