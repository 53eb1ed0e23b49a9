"""What a base optimizer keeps of a parameter: read by type and shape, whatever the names are.

A name such as ``exp_avg`` says what a tensor means only where the tensor is one that the name usually stands
for: an ordinary floating tensor with one entry for each entry of the parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.messages import warn
from grit_optim.processes import shards

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Number, str, bytes, type(None), torch.dtype, torch.device)


def is_entrywise(value: object, parameter: Tensor) -> bool:
    """Whether ``value`` is an ordinary floating tensor with one entry for each entry of ``parameter``.

    A subclass of Tensor (torchao's 8-bit states) is none: most operations fail on it. Nor is fp8, whose scale
    lies elsewhere. A DTensor is one if the processes share it out as they do the parameter.
    """
    return (
        (type(value) in (Tensor, nn.Parameter) or shards.layout_of(value) is not None)
        and shards.layout_of(value) == shards.layout_of(parameter)
        and value.layout is torch.strided  # type: ignore[attr-defined]
        and value.dtype in _FLOATING  # type: ignore[attr-defined]
        and value.shape == parameter.shape  # type: ignore[attr-defined]
    )


def decoded(value: object, parameter: Tensor) -> Tensor | None:
    """``value`` as an ordinary tensor in the shape of ``parameter``; None if it cannot be had.

    A subclass of Tensor that has a ``dequantize()`` of its own is asked for it.
    """
    if is_entrywise(value, parameter):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor) and type(value).dequantize is not Tensor.dequantize:
        plain = value.dequantize()
        return plain if is_entrywise(plain, parameter) else None
    return None


def is_count(value: object) -> bool:
    """Whether ``value`` is a number, a name or a tensor of one number: no coordinates and no shape in it."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() <= 1
    return isinstance(value, _PLAIN)


def states_of(base: Optimizer, parameter: Tensor) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
    """What ``base`` keeps of ``parameter``, and what optimizers inside it (as Lookahead's) keep of it.

    Each with the optimizer whose it is.
    """
    for optimizer in with_inner(base):
        state = optimizer.state.get(parameter)
        if state:
            yield optimizer, state


def with_inner(base: Optimizer) -> list[Optimizer]:
    """``base`` and the optimizers that it holds as attributes, each one whose state is its own."""
    found: list[Optimizer] = [base]
    for optimizer in found:  # grows while it is read
        for value in vars(optimizer).values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                known = any(inner is o or getattr(inner, "state", None) is o.state for o in found)
                if isinstance(inner, Optimizer) and not known:
                    found.append(inner)
    return found


def start_anew(base: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Drop the state of ``parameters``, so that ``base`` makes it anew at its next step.

    A base that counts steps per group (``group["step"]``) makes the state of all of the group's parameters
    anew: with a count that goes on, its bias corrections would be wrong, and some set up state in step 1
    alone.
    """
    dropped = {id(p) for p in parameters}
    for optimizer in with_inner(base):
        for group in optimizer.param_groups:
            if not any(id(p) in dropped for p in group["params"]):
                continue
            whole = isinstance(group.get("step"), int) and group["step"] > 0
            if whole:
                group["step"] = 0
            for parameter in group["params"]:
                if whole or id(parameter) in dropped:
                    optimizer.state.pop(parameter, None)


def described(value: object) -> str:
    """A few words on ``value`` for a message: its type, and the shape and dtype of a tensor."""
    kind = type(value).__name__
    if not isinstance(value, Tensor):
        return kind
    return f"{kind} {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


_told: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()


def warn_once(base: Optimizer, subject: str, message: str) -> None:
    """Warn, unless this base has been warned of this subject."""
    told = _told.setdefault(base, set())
    if subject not in told:
        told.add(subject)
        warn(message)


def listed_state(strange: Mapping[str, object]) -> str:
    """Names of state with what each is, for a message."""
    return ", ".join(f"{name} ({described(strange[name])})" for name in sorted(strange, key=str))
