"""Replace a folder as a whole: a path holds the old content or the new one, never a mixture."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from grit_optim.export import temporary

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


@contextmanager
def replaced(path: Path, drop: Collection[str] = ()) -> Iterator[Path]:
    """A new, empty folder to write to, which takes the place of ``path`` when the body ends without an error.

    Other files of the old folder are carried over. If the body fails or the process is killed, the old folder
    stays as it was. A folder that cannot be replaced (a mount point, the working directory, one whose parent
    is not writable, one that is another user's or holds something of theirs) gets the new files one by one
    instead, the largest last. What processes that were killed have left beside ``path`` or in it is removed.

    Args:
        path: the folder; it need not exist.
        drop: names in the old folder that are not carried over.

    Yields:
        The new folder.

    Raises:
        NotADirectoryError: ``path`` is a file.
        PermissionError: ``path``, or a file in it that would be replaced, is read-only.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; an adapter is saved as a folder: choose another path")
    _check_writable(next(place for place in (path, *path.parents) if place.exists()))
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(path)
    stays = path.exists() and _must_stay(path)
    with temporary.folder(path if stays else path.parent, path.name) as new:
        yield new
        for name in [*os.listdir(new), *drop]:
            _check_writable(path / name)
        if stays:
            flush(new)
            _move_into(new, path, drop)
            return
        if path.exists():
            carry_over(path, new, drop)
            new.chmod(path.stat().st_mode & 0o7777)
        flush(new)
        take_the_place(new, path)


def _check_writable(path: Path) -> None:
    """Refuse what its owner has made read-only: renaming would replace it all the same.

    Raises:
        PermissionError: nobody may write there, or this process may not.
    """
    if path.exists() and not _writable(path):
        raise PermissionError(
            errno.EACCES,
            "it is read-only, so nothing was saved; choose another path, or make it writable (chmod u+w)",
            str(path),
        )


def _writable(path: Path) -> bool:
    """Whether its owner lets somebody write there, and the system this process; root may write anywhere."""
    return bool(path.stat().st_mode & 0o222) and os.access(path, os.W_OK)


def _clear_up(path: Path) -> None:
    """Remove what killed processes have left, and put back an old folder that one had set aside."""
    at_work = [
        temporary.remove_abandoned(place, path.name) for place in (path.parent, path) if place.is_dir()
    ]
    aside = _aside(path)
    if aside.is_dir() and not path.exists() and not any(at_work):
        aside.rename(path)


def _aside(path: Path) -> Path:
    """Where the old folder lies between the two steps of :func:`_swap_in_two_steps`."""
    return path.with_name(f".{temporary.label(path.name)}.previous")


def _must_stay(path: Path) -> bool:
    """Whether the folder cannot be replaced, is the working directory, or is not ours alone.

    A copy of what is another user's would be ours.
    """
    try:
        inside = Path.cwd().is_relative_to(path)
    except FileNotFoundError:  # the working directory is gone already
        inside = False
    return (
        inside
        or os.path.ismount(path)
        or not _writable(path.parent)
        or not temporary.owned((path, *path.iterdir()))
    )


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
    files = (entry for entry in folder.iterdir() if entry.is_file() and not entry.is_symlink())
    for entry in [*files, folder]:  # opening a pipe would wait for its writer
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def take_the_place(new: Path, path: Path) -> None:
    """Put ``new`` where ``path`` is; an old folder is removed, or stands where ``new`` was."""
    if not path.exists():
        try:
            new.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another process has been first
        else:
            return
    if not exchange(new, path):
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
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
