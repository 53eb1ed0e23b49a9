"""Data-parallel training: what each process has seen, added up over all of them.

Under DDP every process sees its own tokens, while ``.grad`` is the average over all. One all-reduce per step
adds up the sums behind the factors. All processes derive the rest from the same bits in the same order, so
they take the same step. All processes of the group take part, also those that have seen nothing in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grit_optim.capture.sums import KindSums, Sums


class Together(NamedTuple):
    """What all processes have seen in a step.

    Attributes:
        sums: the sums that one process would have that had seen all tokens, one entry per bucket.
        fired: backward passes that each site's tap saw, ``[sites]``.
        inner: Σ over tokens of h·δ per site ``[sites]``, of the processes' own losses.
        known: number of processes in which ``inner`` is known ``[sites]``.
    """

    sums: list[Sums]
    fired: Tensor
    inner: Tensor
    known: Tensor


def add_up(
    sums: Sequence[Sums], fired: Sequence[int], inner: Sequence[Tensor | None], group: Any
) -> Together:
    """Add up what the processes have seen. Every process has to call it.

    The loss that is trained is the mean of the processes' losses. Its δ are the processes' own δ divided by
    their number, so Σ δ δᵀ is divided by its square.

    Args:
        sums: the sums over this process's tokens, one entry per bucket.
        fired: how often each site's tap has seen a gradient.
        inner: Σ over tokens of h·δ of each site; None where it is not known.
        group: the process group.
    """
    device = sums[0].rows.device
    values = [
        torch.zeros((), dtype=torch.float32, device=device) if value is None else value.to(device).float()
        for value in inner
    ]
    numbers = torch.tensor(
        [*fired, *(value is not None for value in inner)], dtype=torch.float32, device="cpu"
    )
    numbers = numbers.to(device, non_blocking=True)
    tensors = [t for s in sums for t in s.tensors()]
    parts = [*tensors, torch.stack(values), *numbers.split(len(fired))]
    buffer = torch.cat([part.flatten().to(device) for part in parts])
    torch.distributed.all_reduce(buffer, group=group)
    back = [
        total.view(part.shape).to(part.device)
        for part, total in zip(parts, buffer.split([part.numel() for part in parts]), strict=True)
    ]
    each, size = len(tensors) // len(sums), torch.distributed.get_world_size(group)
    together = [_of_mean_loss(back[i : i + each], size) for i in range(0, len(tensors), each)]
    in_all, fired_in_all, known = back[len(tensors) :]
    return Together(together, fired_in_all, in_all, known)


def _of_mean_loss(total: Sequence[Tensor], size: int) -> Sums:
    """Sums of the mean loss of ``size`` processes, from :meth:`Sums.tensors` added up over them."""
    activation, gradient, rows, tokens, *of_kinds = total
    kinds = KindSums(*of_kinds) if of_kinds else None
    if kinds is not None:
        kinds = kinds._replace(gradient=kinds.gradient / size**2)
    return Sums(activation, gradient / size**2, rows, tokens, kinds)


def mean_loss(loss: Tensor | float | None, device: torch.device, group: Any) -> Tensor | None:
    """The mean of the losses over the processes that know one. Every process has to call it.

    Args:
        loss: this process's loss, or None.
        device: where the result is wanted.
        group: the process group.

    Returns:
        The mean in fp32; None if no process knows a loss.
    """
    # torch.full fills on the device itself: copying a number to a GPU would wait for it.
    own = (
        loss.to(device, torch.float32)
        if isinstance(loss, Tensor)
        else torch.full((), loss or 0.0, dtype=torch.float32, device=device)
    )
    total = torch.stack((own, torch.full_like(own, float(loss is not None))))
    torch.distributed.all_reduce(total, group=group)
    if loss is None and not total[1]:  # only a process without a loss has to wait for the device
        return None
    return total[0] / total[1]
