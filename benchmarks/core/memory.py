"""Keeps freed memory in the process, where the C library is glibc."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc reuse large blocks instead of mapping fresh ones; returns whether it was done.

    By default every large tensor is a fresh mapping whose pages the kernel zeroes again at each step, a third
    of the time of a training step here. It is the same for every optimizer, so it changes no comparison.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # another C library (musl): slower, and nothing else
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
