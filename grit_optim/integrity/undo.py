"""Take note of what objects hold, and put it back bit by bit.

A change that touches many tensors in turn (A, then B, then their moments, then the factors) may be cut off
anywhere: by a lack of memory, by Ctrl-C, by a checkpoint that turns out to be damaged. Half a change of
coordinates destroys an adapter. So what is about to change is noted first, and put back if the change raises.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Undo:
    """What some objects hold now, down to the values of their tensors.

    Dicts, lists, sets, optimizers and the objects of this package are followed to what they hold. Modules,
    objects of other kinds and the parameters of optimizers are not: what is to change of these is named.

    Args:
        deep: objects to note with everything that they hold, tensors by value.
        shallow: as ``deep``, but tensors are not copied. For objects that are replaced, never written to.
        flat: dicts, lists, modules or other objects, of which only the own entries are noted. Of a module and
            of other objects these are the attributes, and the entries of attributes that are dicts.
        parameters: to note with their values, their shapes and their gradients.
        apart: objects that the others lead to, and that are left alone.
    """

    def __init__(
        self,
        deep: Iterable[Any] = (),
        shallow: Iterable[Any] = (),
        flat: Iterable[Any] = (),
        parameters: Iterable[Tensor] = (),
        apart: Iterable[Any] = (),
    ) -> None:
        self._seen: dict[int, Any] = {id(one): one for one in apart}  # held, so that no id is used twice
        self._containers: list[tuple[Any, Any]] = []
        tensors = self._follow(deep)
        self._follow(shallow)
        for one in flat:
            self._note_flat(one)
        self._parameters = [(p, p.data, p.grad) for p in dict.fromkeys(parameters)]
        data = [data for _, data, _ in self._parameters]
        values = copied([*tensors, *data])
        self._tensors = list(zip(tensors, values, strict=False))
        self._data = values[len(tensors) :]

    def _follow(self, roots: Iterable[Any]) -> list[Tensor]:
        """Note all containers that ``roots`` lead to; returns the tensors among what they hold."""
        tensors, waiting = [], list(roots)
        while waiting:
            one = waiting.pop()
            if id(one) in self._seen:
                continue
            self._seen[id(one)] = one
            if isinstance(one, Tensor):
                tensors.append(one)
            elif isinstance(one, tuple):
                waiting.extend(one)
            elif (container := _container(one)) is not None:
                self._note(container)
                waiting.extend(container.values() if isinstance(container, dict) else container)
        return tensors

    def _note_flat(self, one: Any) -> None:
        if isinstance(one, dict | list):
            self._note(one)
            return
        self._note(vars(one))
        for value in vars(one).values():
            if isinstance(value, dict):
                self._note(value)

    def _note(self, container: Any) -> None:
        self._containers.append((container, _shallow(container)))

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the objects hold what they held."""
        for container, held in self._containers:
            _refill(container, held)
        for tensor, value in self._tensors:
            if not _written(tensor, value):
                tensor.data = value
        for (parameter, data, gradient), value in zip(self._parameters, self._data, strict=True):
            held = data if _written(data, value) else value
            if parameter.shape != held.shape or _address(parameter) != _address(held):
                parameter.grad = None
                set_data(parameter, held)
            if parameter.grad is not gradient:
                parameter.grad = gradient


@contextmanager
def undone_on_failure(undo: Undo) -> Iterator[None]:
    """Put back what ``undo`` has noted if the body raises, also where it is interrupted by Ctrl-C."""
    try:
        yield
    except BaseException:
        undo.put_back()
        raise


def _written(tensor: Tensor, value: Tensor) -> bool:
    """Write ``value`` into ``tensor``; whether that was possible, on a device that has just failed."""
    try:
        tensor.detach().copy_(value)
    except BaseException:
        return False
    return True


def set_data(parameter: Tensor, data: Tensor) -> None:
    """Let ``parameter``, which has no gradient, hold ``data``, which may have another shape."""
    # While an old graph is alive, autograd keeps the parameter's old shape. A change of dtype renews it.
    if parameter.shape != data.shape:
        other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
        parameter.data = parameter.data.to(other)
    parameter.data = data


def copied(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of the tensors, made in one call for each device and dtype."""
    copies: list[Any] = [None] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            alike.setdefault((tensor.device, tensor.dtype), []).append(place)
        else:
            copies[place] = tensor.detach().clone()
    with torch.no_grad():
        for places in alike.values():
            for place in places:
                copies[place] = torch.empty_like(tensors[place], requires_grad=False)
            torch._foreach_copy_([copies[i] for i in places], [tensors[i].detach() for i in places])
    return copies


def _address(tensor: Tensor) -> int:
    """Where a tensor's entries begin, of a DTensor those of this process."""
    return getattr(tensor, "_local_tensor", tensor).data_ptr()


def _container(one: Any) -> Any | None:
    """The dict, list, set or deque that ``one`` is, or that holds its attributes; None: do not follow it."""
    if isinstance(one, dict | list | set | deque):
        return one
    if isinstance(one, nn.Module | type) or not hasattr(one, "__dict__"):
        return None
    kind = type(one)
    frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return vars(one) if isinstance(one, Optimizer) or (ours and not frozen) else None


def _shallow(container: Any) -> Any:
    return dict(container) if isinstance(container, Mapping) else list(container)


def _refill(container: Any, held: Any) -> None:
    """Let ``container`` hold the entries of ``held``, in their order."""
    if isinstance(container, list):
        container[:] = held
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(held)
    else:
        container.update(held)
