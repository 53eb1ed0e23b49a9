"""A checkpoint by the names of parameters, as ``torch.distributed.checkpoint`` keeps it.

Its functions keep of an optimizer what it has of each parameter, and the parameter groups, and drop all else.
For them the state of a pair lies with what the base keeps of A, as ``{"0": {name: tensor}}``: by the number
of the expert, since those of a layer share one parameter. What is not of a pair is one more tensor, with the
first of them. A checkpoint is loaded into the tensors of an optimizer that has done nothing yet, so that
tensor has a fixed size: it holds compressed JSON.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grit_optim.checkpoints.checks import KEY
from grit_optim.integrity.fields import Damaged
from grit_optim.lora.site import Site

_RECORD = "record"
_NOTHING = "nothing"
_TENSOR = "tensor of one number"
_SIZE = 2**16


def spread(
    state: Mapping[Any, Mapping[str, Any]], own: Mapping[str, Any], sites: Iterable[Site], groups: Any
) -> dict[Any, dict[str, Any]]:
    """What the base keeps of each parameter, with our own state beside it.

    Args:
        state: by the parameters' numbers in the groups.
        own: our own state.
        sites: the pairs.
        groups: the base's parameter groups.
    """
    together = {number: dict(entries) for number, entries in state.items()}
    numbers = {id(p): i for i, p in reversed(list(enumerate(_parameters(groups))))}
    rest = {name: value for name, value in own.items() if name != "sites"}
    for site in sites:
        number = numbers.get(id(site.a))
        if number is None or site.name not in own["sites"]:
            continue
        entry = together.setdefault(number, {}).setdefault(KEY, {})
        entry[str(site.expert)] = dict(own["sites"][site.name])
        if rest:
            entry[_RECORD], rest = _encoded(rest, site.a.device), {}
    if not state:  # as of SGD; torch takes nothing at all for whole, but not something of some
        for number, parameter in enumerate(_parameters(groups)):
            nothing = torch.zeros(1, dtype=torch.uint8, device=parameter.device)
            together.setdefault(number, {KEY: {_NOTHING: nothing}})
    return together


def names_of_state(
    state: Mapping[Any, Mapping[str, Any]], sites: Iterable[Site], groups: Any
) -> dict[Any, dict[str, Any]]:
    """The names of what :func:`spread` has for each parameter, without the values."""
    names: dict[Any, dict[str, Any]] = {p: dict.fromkeys(entries) for p, entries in state.items()}
    for parameter in [site.a for site in sites] if state else _parameters(groups):
        names.setdefault(parameter, {})[KEY] = None
    return defaultdict(dict, names)


def collected(
    state_dict: Mapping[str, Any], sites: Iterable[Site], groups: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Undo :func:`spread`.

    Args:
        state_dict: of the base, perhaps with our own state spread in it.
        sites: the pairs that the state may be of.
        groups: the base's parameter groups, in the order of those of the state.

    Returns:
        The base's part, and our own state; None if it is not there.

    Raises:
        ValueError: a part of our own state is missing.
    """
    state = state_dict.get("state")
    if not isinstance(state, Mapping) or not any(_holds(entries) for entries in state.values()):
        return dict(state_dict), None
    saved: Sequence[Any] = [key for group in state_dict["param_groups"] for key in group["params"]]
    keys = {id(p): key for p, key in zip(_parameters(groups), saved, strict=False)}
    found = {key: entries[KEY] for key, entries in state.items() if _holds(entries)}
    records = [entry[_RECORD] for entry in found.values() if _RECORD in entry]
    if not records:
        raise Damaged("the state by parameters", f"lacks {KEY}.{_RECORD}, which lies with the first pair's A")
    own: dict[str, Any] = {**_decoded(records[0]), "sites": {}}
    for site in sites:
        entry = found.get(keys.get(id(site.a)), {})
        if str(site.expert) in entry:
            own["sites"][site.name] = entry[str(site.expert)]
    plain = {key: _without(entries) for key, entries in state.items()}
    return {**state_dict, "state": {key: entries for key, entries in plain.items() if entries}}, own


def _holds(entries: Any) -> bool:
    return isinstance(entries, Mapping) and bool(entries.get(KEY))


def _without(entries: Any) -> Any:
    return {k: v for k, v in entries.items() if k != KEY} if isinstance(entries, Mapping) else entries


def _parameters(groups: Any) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def _encoded(rest: Mapping[str, Any], device: torch.device) -> Tensor:
    """Numbers, names, lists and dicts as bytes ``[n · 2¹⁶]``: their length, and compressed JSON."""
    text = zlib.compress(json.dumps(rest, default=_plain).encode())
    content = len(text).to_bytes(4, "little") + text
    content += bytes(-len(content) % _SIZE)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)


def _plain(value: Tensor) -> dict[str, Any]:
    """A tensor of one number in JSON."""
    return {_TENSOR: value.item(), "dtype": str(value.dtype).removeprefix("torch.")}


def _as_tensor(found: dict[str, Any]) -> Any:
    """Undo :func:`_plain`; another dict stays as it is."""
    if _TENSOR not in found:
        return found
    return torch.tensor(found[_TENSOR], dtype=getattr(torch, found["dtype"]), device="cpu")


def _decoded(record: Tensor) -> dict[str, Any]:
    """Undo :func:`_encoded`.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = bytes(record.cpu().tolist())
        size = int.from_bytes(content[:4], "little")
        rest = json.loads(zlib.decompress(content[4 : 4 + size]), object_hook=_as_tensor)
    except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise Damaged(f"{KEY}.{_RECORD}", f"cannot be read ({error})") from None
    if not isinstance(rest, dict):
        raise Damaged(f"{KEY}.{_RECORD}", "is no dict")
    return rest
