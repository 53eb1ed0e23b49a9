"""Checks of what a checkpoint holds, entry by entry, before anything of it is used.

A check is called with the path of an entry, for the message, and its value. It raises ValueError if the value
cannot be what was saved. Checks of dicts and lists are made of checks of what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from grit_optim.messages import listed, nearest

Check = Callable[[str, Any], None]
Fields = Mapping[str, Check]


class Damaged(ValueError):
    """A checkpoint holds what cannot have been saved."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(
            f"the checkpoint is damaged, and nothing of it was loaded: {path} {problem}. Load an intact one. "
            "Where only GRIT's part of it is damaged, `state_dict.pop('grit')` leaves that part out, and the "
            "curvature starts anew"
        )


def record(required: Fields, optional: Fields | None = None) -> Check:
    """A dict with these entries. Others are nobody's business, and ignored."""
    optional = optional or {}

    def check(path: str, value: Any) -> None:
        _is_dict(path, value)
        for name, field in {**required, **optional}.items():
            if name in value:
                field(f"{path}[{name!r}]", value[name])
            elif name in required:
                close = nearest(name, [key for key in value if key not in required and key not in optional])
                hint = f", but has {close!r}" if close else ""
                raise Damaged(path, f"lacks {name!r}{hint}")

    return check


def by_name(each: Check, names: Collection[str] | None = None) -> Check:
    """A dict of names to what ``each`` accepts; if it is not empty, with an entry for each of ``names``."""

    def check(path: str, value: Any) -> None:
        _is_dict(path, value)
        for name, entry in value.items():
            if not isinstance(name, str):
                raise Damaged(path, f"has an entry {name!r}, where only names belong")
            each(f"{path}[{name!r}]", entry)
        if value and (missing := sorted(set(names or ()) - value.keys())):
            raise Damaged(path, f"lacks {listed(missing, 3)}")

    return check


def alike() -> Check:
    """A dict of dicts that all have entries of the same names."""

    def check(path: str, value: Any) -> None:
        every = {name for entries in value.values() for name in entries}
        for name, entries in value.items():
            if missing := sorted(every - set(entries)):
                raise Damaged(f"{path}[{name!r}]", f"lacks {listed(missing, 3)}, which the others have")

    return check


def several(each: Check, length: int | None = None) -> Check:
    """A list or tuple, of ``length`` entries if given."""

    def check(path: str, value: Any) -> None:
        if not isinstance(value, list | tuple):
            raise Damaged(path, f"is a {type(value).__name__}, not a list")
        if length is not None and len(value) != length:
            raise Damaged(path, f"has {len(value)} entries, not {length}")
        for place, entry in enumerate(value):
            each(f"{path}[{place}]", entry)

    return check


def whole(low: int = 0) -> Check:
    """A whole number of at least ``low``."""

    def check(path: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise Damaged(path, f"is {value!r:.60}, not a whole number of at least {low}")

    return check


def number(low: float = -math.inf, high: float = math.inf, finite: bool = True) -> Check:
    """A number, or a tensor of one, from ``low`` to ``high``."""

    def check(path: str, value: Any) -> None:
        single = isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0
        if not (single or isinstance(value, int | float)) or isinstance(value, bool):
            raise Damaged(path, f"is {value!r:.60}, not a number")
        if isinstance(value, int) and not is_finite(value):
            raise Damaged(path, "is too large")
        _in_range(path, float(value), low, high, finite)

    return check


def text(choices: Collection[str]) -> Check:
    """One of some words."""

    def check(path: str, value: Any) -> None:
        if value not in choices or not isinstance(value, str):
            raise Damaged(path, f"is {value!r:.60}, which is none of {', '.join(choices)}")

    return check


def some_text(path: str, value: Any) -> None:
    """Check that an entry is text."""
    if not isinstance(value, str):
        raise Damaged(path, f"is {value!r:.60}, not text")


def optional(each: Check) -> Check:
    """None, or what ``each`` accepts."""

    def check(path: str, value: Any) -> None:
        if value is not None:
            each(path, value)

    return check


def tensor(*shape: int, low: float = -math.inf, high: float = math.inf, finite: bool = True) -> Check:
    """A tensor of floating point numbers of this shape from ``low`` to ``high``, finite as fp32.

    If not ``finite``, infinity is allowed, but not NaN.
    """

    def check(path: str, value: Any) -> None:
        _is_tensor(path, value, shape)
        if not value.dtype.is_floating_point:
            raise Damaged(path, f"has dtype {value.dtype}, not a floating point one")
        if value.numel() and value.device.type != "meta":
            least, most = (float(v) for v in torch.aminmax(value.detach().float()))
            _in_range(path, least, low, high, finite or math.isnan(least))
            _in_range(path, most, low, high, finite)

    return check


def factor(rank: int) -> Check:
    """A symmetric matrix ``[rank, rank]`` whose diagonal is not negative, up to rounding."""
    plain = tensor(rank, rank)

    def check(path: str, value: Any) -> None:
        plain(path, value)
        if value.device.type == "meta":
            return
        value = value.detach().float()
        slack = _ROUNDING * float(value.abs().max())
        if float((value - value.mT).abs().max()) > slack:
            raise Damaged(path, "is not symmetric, as a covariance is")
        if float(value.diagonal().min()) < -slack:
            raise Damaged(path, "has a negative number on its diagonal, as no covariance has")

    return check


def rotation(rank: int) -> Check:
    """An orthogonal matrix ``[rank, rank]``, up to rounding."""
    plain = tensor(rank, rank)

    def check(path: str, value: Any) -> None:
        plain(path, value)
        if value.device.type == "meta":
            return
        value = value.detach().float()
        gram = torch.stack([(row * value).sum(-1) for row in value])  # a caller's autocast rounds products
        eye = torch.eye(rank, dtype=value.dtype, device=value.device)
        if not float((gram - eye).abs().max()) < _ROUNDING:
            raise Damaged(path, "is not orthogonal, as eigenvectors are")

    return check


def counted(low: int, high: int) -> Check:
    """A tensor of one whole number from ``low`` to ``high``."""

    def check(path: str, value: Any) -> None:
        _is_tensor(path, value, ())
        if value.dtype.is_floating_point or value.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise Damaged(path, f"has dtype {value.dtype}, not one of whole numbers")
        if value.device.type != "meta":
            _in_range(path, int(value), low, high, True)

    return check


def flag(path: str, value: Any) -> None:
    """A tensor that is true or false."""
    _is_tensor(path, value, ())
    if value.dtype != torch.bool:
        raise Damaged(path, f"has dtype {value.dtype}, not torch.bool")


_ROUNDING = 1e-3


def is_finite(value: Any) -> bool:
    """Whether a number, or a tensor of one, is finite as a float; a whole number may be too large for one."""
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    return finite


def _is_dict(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise Damaged(path, f"is a {type(value).__name__}, not a dict")


def _is_tensor(path: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise Damaged(path, f"is a {type(value).__name__}, not a tensor")
    if value.layout is not torch.strided:
        raise Damaged(path, f"is stored as {value.layout}, not entry by entry")
    if tuple(value.shape) != shape:
        raise Damaged(path, f"has shape {list(value.shape)}, not {list(shape)}")


def _in_range(path: str, value: float, low: float, high: float, finite: bool) -> None:
    if finite and not math.isfinite(value):
        raise Damaged(path, "holds NaN or infinity")
    if value < low or value > high:
        raise Damaged(path, f"holds {value:g}, which is not from {low:g} to {high:g}")
