"""Checks of single options: each takes a name and a value, and raises what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from grit_optim.messages import nearest

Check = Callable[[str, Any], None]


def _hint(value: Any, allowed: Sequence[str]) -> str:
    """The nearest of the allowed words, for the end of a message."""
    close = nearest(value, allowed)
    return f"; did you mean {close!r}?" if close else ""


def one_of(allowed: tuple[str, ...]) -> Check:
    """A check that a value is among ``allowed``, with the nearest of them in the message."""

    def check(name: str, value: Any) -> None:
        """Refuse what is no word of the list."""
        if value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}={value!r} is not one of {listed}{_hint(value, allowed)}")

    return check


def whole(least: int, optional: bool = False) -> Check:
    """A check for a whole number from ``least`` up, or None where that is allowed."""

    def check(name: str, value: Any) -> None:
        """Refuse what is no whole number, and one that is too small."""
        if optional and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number{' or None' if optional else ''}, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

    return check


def real(allowed: str, test: Callable[[float], bool], besides: tuple[object, ...] = ()) -> Check:
    """A check for a finite number that passes ``test``, or one of the values ``besides``."""

    def check(name: str, value: Any) -> None:
        """Refuse what is no number, and one that is not finite or fails the test."""
        if any(value is other or (isinstance(value, str) and value == other) for other in besides):
            return
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            words = [other for other in besides if isinstance(other, str)]
            raise TypeError(f"{name} must be a number {allowed}, got {value!r}{_hint(value, words)}")
        if not math.isfinite(value) or not test(value):
            raise ValueError(f"{name} must be {allowed}, got {value}")

    return check


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def word(name: str, value: Any) -> None:
    """Refuse what is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name in quotes, got {value!r}")


def device(name: str, value: Any) -> None:
    """Refuse what is neither None nor a device."""
    if value is None:
        return
    try:
        torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}={value!r} is no device; use None (where the parameters are), 'cpu' or 'cuda'"
        ) from error


def budget_value(name: str, value: Any) -> None:
    """Refuse what is neither a share of the parameters nor a number of them.

    Raises:
        TypeError: no number.
        ValueError: a float outside (0, 1], or a number below 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a float in (0, 1], a share of the adapter's parameters, or a whole number of "
            f"them, got {value!r}{_hint(value, [EFFECTIVE])}"
        )
    if isinstance(value, float):
        real("in (0, 1] where it is a float, a share of the parameters", lambda x: 0 < x <= 1)(name, value)
    else:
        whole(1)(name, value)


EFFECTIVE = "effective"
"""The budget that sizes itself."""


def budget_of(parts: tuple[str, ...]) -> Check:
    """A check for a budget or a pair of them, either for each of some parts, :data:`EFFECTIVE`, or None."""

    def check(name: str, value: Any) -> None:
        """Refuse anything else."""
        if value is None or (isinstance(value, str) and value == EFFECTIVE):
            return
        if isinstance(value, Mapping):
            if not value:
                raise ValueError(f"{name} is an empty mapping; give budgets as in {{'vision': 0.5}}, or None")
            for part, own in value.items():
                one_of(parts)(f"a part in {name}", part)
                course(f"{name}[{part!r}]", own)
        else:
            course(name, value)

    return check


def course(name: str, value: Any) -> None:
    """Refuse what is neither a budget nor a pair of budgets, its start and its end."""
    if isinstance(value, tuple | list) and len(value) == 2:
        budget_value(f"the start of {name}", value[0])
        budget_value(f"the end of {name}", value[1])
    else:
        budget_value(name, value)


def shares_of(kinds: tuple[str, ...]) -> Check:
    """A check for None, "equal", or a mapping of some of ``kinds`` to shares, not all of them 0."""

    def check(name: str, value: Any) -> None:
        """Refuse anything else."""
        if value is None or (isinstance(value, str) and value == "equal"):
            return
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{name} must be None, 'equal', or shares such as {{'text': 1, 'vision': 1}}, got {value!r}"
                f"{_hint(value, ['equal'])}"
            )
        for kind, share in value.items():
            one_of(kinds)(f"a kind of token in {name}", kind)
            real("from 0 up", lambda x: x >= 0)(f"the share of {kind!r} in {name}", share)
        if not any(value.values()):
            raise ValueError(
                f"{name}={value!r} leaves no token anything; give at least one kind a share above 0"
            )

    return check
