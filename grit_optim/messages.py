"""How users are told: warnings that point at a line of their own program, notes, lists of names."""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType

# Packages between the user's program and this one: a warning points at none of their lines.
_LIBRARIES = {
    "grit_optim",
    "torch",
    "peft",
    "transformers",
    "accelerate",
    "trl",
    "lightning",
    "pytorch_lightning",
}

_LOG = logging.getLogger("grit_optim")


def tell(message: str) -> None:
    """Say in the log what has been decided, where nothing is wrong. Python prints it unless told not to."""
    _LOG.warning(message)


def warn(message: str) -> None:
    """Issue a UserWarning that points at the line of the user's program that led here.

    That line is in the nearest frame outside this package and the libraries that run training. Where there is
    no such frame (in a hook that autograd runs on a thread of its own), the outermost frame is taken.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _library(frame) in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _library(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, separated by commas, with an ellipsis where there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known name that is most like ``word``, for a hint in a message; None if none is near."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return close[0] if close else None
