"""Replace a folder as a whole: a path holds the old content or the new one, never a mixture."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


@contextmanager
def replaced(path: Path, drop: Collection[str] = ()) -> Iterator[Path]:
    """A new, empty folder to write to, which takes the place of ``path`` when the body ends without an error.

    Other files of the old folder are carried over. If the body fails or the process is killed, the old folder
    stays as it was. A folder that cannot be replaced (a mount point, the working directory, one whose parent
    is not writable) gets the new files one by one instead, the largest last.

    Args:
        path: the folder; it need not exist.
        drop: names in the old folder that are not carried over.

    Yields:
        The new folder.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; an adapter is saved as a folder: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    stays = path.exists() and _must_stay(path)
    place = path if stays else path.parent
    new = place / f".{path.name}.{uuid.uuid4().hex}.tmp"
    new.mkdir()
    try:
        yield new
        if stays:
            flush(new)
            _move_into(new, path, drop)
            return
        if path.exists():
            carry_over(path, new, drop)
            new.chmod(path.stat().st_mode & 0o7777)
        flush(new)
        take_the_place(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _must_stay(path: Path) -> bool:
    """Whether the folder cannot be replaced, or is the process's working directory."""
    try:
        inside = Path.cwd().is_relative_to(path)
    except FileNotFoundError:  # the working directory is gone already
        inside = False
    return inside or os.path.ismount(path) or not os.access(path.parent, os.W_OK | os.X_OK)


def _move_into(new: Path, path: Path, drop: Collection[str]) -> None:
    """Move each file in one step, the smallest first: configuration and report before the weights."""
    for entry in sorted(new.iterdir(), key=lambda file: file.stat().st_size):
        entry.replace(path / entry.name)
    for name in drop:
        (path / name).unlink(missing_ok=True)
    flush(path)


def carry_over(old: Path, new: Path, drop: Collection[str]) -> None:
    """Give ``new`` what it lacks of ``old``: hard links where the file system has them, else copies."""
    for entry in old.iterdir():
        target = new / entry.name
        if entry.name in drop or target.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(target))


def _link(source: str, target: str) -> None:
    """Make a hard link, or a copy where there are no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def flush(folder: Path) -> None:
    """Wait until the files are on the disk: after a crash of the machine no file is empty."""
    for entry in [*folder.iterdir(), folder]:
        if entry.is_symlink() or (entry.is_dir() and entry != folder):
            continue
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def take_the_place(new: Path, path: Path) -> None:
    """Put ``new`` where ``path`` is; an old folder is removed, or stands where ``new`` was."""
    if not path.exists():
        new.rename(path)
    elif not exchange(new, path):
        _swap_in_two_steps(new, path)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step (Linux).

    Returns:
        Whether they were exchanged: False where the system cannot.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP):
        return False
    raise OSError(code, f"could not put the new folder in the place of {other}: {os.strerror(code)}")


def _swap_in_two_steps(new: Path, path: Path) -> None:
    """Rename the old folder, then the new one, where there is no exchange.

    Between the two steps nothing is at ``path``, and the old folder lies beside it.
    """
    aside = path.with_name(f".{path.name}.previous")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
