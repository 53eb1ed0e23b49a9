"""What a base optimizer has loaded: whether it can step with that.

torch's loaders take any settings and any state, and fail in the middle of a later step. So do those of most
other optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.base.moments import SQUARE_LIKE
from grit_optim.integrity.fields import Damaged, is_finite
from grit_optim.processes import shards

_FACTORED = ("Adafactor", "LBFGS")
"""Optimizers of torch whose state tensors have other shapes than their parameters."""
_NEVER_NEGATIVE = (*SQUARE_LIKE, "exp_inf", "acc_delta")
"""State of torch's own optimizers of which they take roots, or by which they divide."""


def settings_of(base: Optimizer) -> list[list[str]]:
    """The names of each parameter group's settings that have a default."""
    return [[name for name in base.defaults if name in group] for group in base.param_groups]


def check_loaded(base: Optimizer, before: Sequence[Sequence[str]]) -> None:
    """Refuse settings or state that the base cannot step with.

    Settings are compared with the defaults. State has to be finite. The state of torch's own optimizers is
    also to have the shapes of the parameters, and alike entries throughout a group.

    Args:
        base: the base optimizer, after loading.
        before: what :func:`settings_of` gave before that.

    Raises:
        ValueError: a setting is missing or of another kind, or a tensor of state is not finite or misshapen.
    """
    for i, (group, known) in enumerate(zip(base.param_groups, before, strict=True)):
        for name in known:
            path = f"param_groups[{i}][{name!r}]"
            if name not in group:
                raise Damaged(f"param_groups[{i}]", f"lacks {name!r}, which {type(base).__name__} needs")
            _check_setting(path, group[name], base.defaults[name])
        _check_rate(f"param_groups[{i}]", group)
        _check_group(base, i, group["params"])


def _check_setting(path: str, new: Any, old: Any) -> None:
    """Refuse a setting of another kind than the default."""
    if isinstance(old, list | tuple):
        if not isinstance(new, list | tuple) or len(new) != len(old):
            raise Damaged(path, f"is {new!r:.60}, not {len(old)} values as {old!r:.60}")
        for place, (one, other) in enumerate(zip(new, old, strict=True)):
            _check_setting(f"{path}[{place}]", one, other)
    elif _is_number(old):
        if not _is_number(new):
            raise Damaged(path, f"is {new!r:.60}, not a number")
        if math.isfinite(old) and not is_finite(new):
            raise Damaged(path, "is NaN, infinite or too large")
    elif isinstance(old, bool) and not (new is None or isinstance(new, bool | int)):
        raise Damaged(path, f"is {new!r:.60}, neither true nor false")
    elif old is None and isinstance(new, Tensor) and new.numel() != 1:
        raise Damaged(path, f"is a tensor {list(new.shape)}, where one value belongs")
    elif isinstance(old, str) and not (new is None or isinstance(new, str)):
        raise Damaged(path, f"is {new!r:.60}, not a word as {old!r}")


def _check_rate(path: str, group: Mapping[str, Any]) -> None:
    """Refuse values under the names of the field that no optimizer of that name takes."""
    rate, betas = group.get("lr", 0.0), group.get("betas")
    if _is_number(rate) and rate < 0:
        raise Damaged(f"{path}['lr']", f"is {float(rate)}, and no learning rate is negative")
    if isinstance(betas, list | tuple) and any(_is_number(b) and not 0 <= b <= 1 for b in betas):
        raise Damaged(f"{path}['betas']", f"is {betas!r:.60}; averages keep shares from 0 to 1")


def _is_number(value: Any) -> bool:
    single = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
    return single or (isinstance(value, int | float) and not isinstance(value, bool))


def _check_group(base: Optimizer, group: int, parameters: Sequence[Tensor]) -> None:
    """Check the state of one group's parameters; torch's own optimizers keep the same of all of them."""
    torchs_own = type(base).__module__.startswith("torch.optim") and type(base).__name__ not in _FACTORED
    first: dict[str, str] = {}
    for place, parameter in enumerate(parameters):
        path, state = f"the state of parameter {place} of group {group}", base.state.get(parameter)
        if state is None or state == {}:
            continue
        if not isinstance(state, dict):
            raise Damaged(path, f"is a {type(state).__name__}, not a dict")
        for name, value in state.items():
            if isinstance(value, Tensor):
                _check_finite(f"{path}: {name}", value)
        if torchs_own:
            _check_shapes(path, state, parameter)
            found = {name: _kind(value) for name, value in state.items() if value is not None}
            first = first or found
            if odd := sorted(str(name) for name, _ in found.items() ^ first.items()):
                raise Damaged(path, f"differs in {', '.join(odd)} from that of the group's first parameter")


def _check_finite(path: str, value: Tensor) -> None:
    """Refuse NaN, and infinity in a tensor of several numbers; a single one may be "none so far"."""
    value = shards.local(value)
    plain = type(value) in (Tensor, nn.Parameter) and value.device.type != "meta"  # no quantized subclass
    if not plain or not value.is_floating_point() or value.numel() == 0:
        return
    sound = value.isfinite() if value.numel() > 1 else ~value.isnan()
    if not bool(sound.all()):
        raise Damaged(path, "holds NaN or infinity, which the next step would write into the weights")


def _kind(value: Any) -> str:
    """A tensor, a number or something else. Counters may be either of the first two kinds of number."""
    single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    return "number" if single else "tensor" if isinstance(value, Tensor) else "other"


def _check_shapes(path: str, state: Mapping[str, Any], parameter: Tensor) -> None:
    for name, value in state.items():
        if name == "step":
            single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
            if not (single or _is_number(value)) or not is_finite(value) or value < 0:
                raise Damaged(f"{path}: step", f"is {value!r:.60}, not a count of steps")
        elif isinstance(value, Tensor):
            if value.dim() > 0 and value.shape != parameter.shape:
                raise Damaged(
                    f"{path}: {name}", f"has shape {list(value.shape)}, not {list(parameter.shape)}"
                )
            if not (value.is_floating_point() or value.is_complex()):
                raise Damaged(f"{path}: {name}", f"has dtype {value.dtype}, not a floating point one")
            if name in _NEVER_NEGATIVE and bool((shards.local(value) < 0).any()):
                raise Damaged(f"{path}: {name}", "holds a negative number, as no such average has")
            if any(n > 1 and step == 0 for n, step in zip(value.shape, value.stride(), strict=True)):
                raise Damaged(f"{path}: {name}", "has entries that share their memory, so no step can write")
        elif not (value is None or isinstance(value, int | float)):
            raise Damaged(f"{path}: {name}", f"is a {type(value).__name__}, not a tensor")
