"""Values given on the command line, checked where they are read."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def _number(text: str, kind: Callable[[str], T], what: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}") from None


def positive_int(text: str) -> int:
    """A whole number from 1 up."""
    value = _number(text, int, "whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def whole(text: str) -> int:
    """A whole number from 0 up."""
    value = _number(text, int, "whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text, float, "number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def not_negative(text: str) -> float:
    """A finite number from 0 up."""
    value = _number(text, float, "number")
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return value


def beta(text: str) -> float:
    """A number in [0, 1)."""
    value = not_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def several(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A comma-separated list without repeats, every item read by `kind`."""

    def read(text: str) -> list[T]:
        """The list that `text` names."""
        items = [item.strip() for item in text.split(",")]
        if not all(items):
            raise argparse.ArgumentTypeError(f"{text!r} has an empty item; separate values by single commas")
        values = [kind(item) for item in items]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} names a value twice")
        return values

    return read


def option(text: str) -> tuple[str, Any]:
    """`key=value` for an optimizer's constructor; a value that is no JSON is text."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def data(text: str) -> tuple[str, Path | None]:
    """`NAME` or `NAME=FOLDER`; no folder stands for the hub's copy."""
    name, separator, folder = text.partition("=")
    if not name or (separator and not folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME or NAME=FOLDER")
    return name, Path(folder) if folder else None


def flag(name: str) -> str:
    """The option that sets a field: `--weight-decay` for `weight_decay`."""
    return "--" + name.replace("_", "-")


def add_device(parser: argparse._ActionsContainer) -> None:
    """The option `--device`."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
