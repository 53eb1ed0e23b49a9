"""Uneven inputs: what a process that has run out of them does while the others go on (``Join``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from grit_optim.processes.group import Processes


class Shadow:
    """The hook of an optimizer in ``torch.distributed.algorithms.Join``.

    A process without inputs takes part in what the others exchange in each of their steps, with nothing of
    its own. At the end all go on from the state of the one that stepped last, moments included.

    Args:
        optimizer: the optimizer.
        processes: those that train together.
        exchange: takes part in what the others exchange in a step.
    """

    def __init__(self, optimizer: Optimizer, processes: Processes, exchange: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._processes = processes
        self._exchange = exchange

    def main_hook(self) -> None:
        """Stand in for one step of the others."""
        self._exchange()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Take the state of the last process to run out of inputs, the highest of those in rank."""
        group = self._processes.group
        if group is None:
            return
        distributed = torch.distributed
        own = distributed.get_rank(group)
        device = device_of(self._optimizer)
        last = torch.tensor([own if is_last_joiner else -1], dtype=torch.int64, device=device)
        distributed.all_reduce(last, op=distributed.ReduceOp.MAX, group=group)
        source = int(last)
        state = self._optimizer.state_dict() if own == source else None
        sent = [tree_map_only(Tensor, lambda t: t.cpu(), state)]
        distributed.broadcast_object_list(
            sent, src=distributed.get_global_rank(group, source), group=group, device=device
        )
        if own != source:
            self._optimizer.load_state_dict(sent[0])


def device_of(optimizer: Optimizer) -> torch.device:
    """The device of its first parameter, on which processes exchange what is not of one pair."""
    parameters: Any = (p for group in optimizer.param_groups for p in group["params"])
    return next(parameters).device
