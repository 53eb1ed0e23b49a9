"""What users are told: warnings that name the caller's line, and names in messages."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType

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


def warn(message: str) -> None:
    """Issue a UserWarning for the nearest caller outside this package and the libraries that training goes through.

    Where there is none (a hook on a thread of autograd's own), the outermost frame is named.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _library(frame) in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _library(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names for a message, with an ellipsis where there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
