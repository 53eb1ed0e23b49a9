"""Work on matrices of which each process has some rows: what such work asks of the other processes.

Everything that is done entry by entry needs only a process's own rows. Norms, inner products and r×r products
are sums over processes. A product on the rank's side needs whole columns: A's rows are its rank, so its rows
are exchanged for columns, and what comes out for rows. Each process sends what it has once, instead of
getting everything.

Such work is a generator. It yields what it asks for, a list at a time, and is sent the answers. Work on many
matrices goes on side by side, so that what all of it asks for at one time takes one message of each kind.
Nothing is sent for matrices that a process has whole; there an answer is the value that was given.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from grit_optim.processes.shards import Layout, group_of_mesh, most_rows, rows_of


class Sum(NamedTuple):
    """Asks for the sum over processes. ``value`` is this process's share, of any shape."""

    value: Tensor


class Norm(NamedTuple):
    """Asks for the norm of the whole matrices. ``value`` has the norms of this process's parts."""

    value: Tensor


class RankMean(NamedTuple):
    """Asks for the mean over the rank. ``value`` has the mean over what this process has of the rank."""

    value: Tensor


class Columns(NamedTuple):
    """Asks for all of the rank on some of the width, for this process's part ``[m, rows, columns]``."""

    value: Tensor


class Rows(NamedTuple):
    """Asks for this process's part, of what is changed since :class:`Columns` gave it."""

    value: Tensor


Ask = Sum | Norm | RankMean | Columns | Rows
_Result = TypeVar("_Result")
Work = Generator[Sequence[Ask], Sequence[Tensor], _Result]


class Sharing(NamedTuple):
    """How stacked matrices ``[m, rows, columns]`` are shared out.

    Attributes:
        layout: of each of them.
        rank_dim: the dimension of the stack that runs over the rank, 1 or 2.
        rank: its size.
        width: the size of the other one.
    """

    layout: Layout
    rank_dim: int
    rank: int
    width: int

    @property
    def of_rank(self) -> bool:
        """Whether a process has a part of the rank, rather than of the width."""
        return self.layout.dim == self.rank_dim - 1

    @property
    def replicas(self) -> int:
        """How many processes have equal parts (HSDP)."""
        mesh = self.layout.mesh
        return mesh.size() // mesh.size(self.layout.axis)


def do(works: Iterable[tuple[Sharing | None, Work[None]]]) -> None:
    """Do all of the work; in the order of every process where matrices are shared out.

    What is done on whole matrices is done one after another.
    """
    waiting = []
    for sharing, work in works:
        asks = next(work, None)
        if sharing is not None and asks is not None:
            waiting.append((sharing, work, asks))
            continue
        while asks is not None:
            asks = _go_on(work, [ask.value for ask in asks])
    while waiting:
        asked = [(sharing, ask) for sharing, _, asks in waiting for ask in asks]
        going = [(sharing, work, len(asks)) for sharing, work, asks in waiting]
        waiting.clear()  # large matrices are let go as soon as they can be
        found = answers(asked)[::-1]
        asked.clear()
        for sharing, work, count in going:
            asks = _go_on(work, [found.pop() for _ in range(count)])
            if asks is not None:
                waiting.append((sharing, work, asks))


def _go_on(work: Work[None], found: Sequence[Tensor]) -> Sequence[Ask] | None:
    try:
        return work.send(found)
    except StopIteration:
        return None


def answers(asks: Sequence[tuple[Sharing | None, Ask]]) -> list[Tensor]:
    """The answers, by one message for all of a kind. Every process has to ask for the same."""
    found: list[Tensor] = [ask.value for _, ask in asks]
    messages: dict[Hashable, list[int]] = {}
    for i, (sharing, ask) in enumerate(asks):
        if sharing is None or (isinstance(ask, RankMean | Columns | Rows) and not sharing.of_rank):
            continue
        exchanged = isinstance(ask, Columns | Rows)
        layout = sharing.layout
        key = (type(ask), layout, sharing.rank) if exchanged else (Sum, id(layout.mesh), layout.axis)
        messages.setdefault(key, []).append(i)
    for places in messages.values():
        some: Any = [asks[i] for i in places]
        kind = type(some[0][1])
        exchange = _columns if kind is Columns else _rows if kind is Rows else _sums
        for i, tensor in zip(places, exchange(some), strict=True):
            found[i] = tensor
    return found


def _sums(asks: Sequence[tuple[Sharing, Ask]]) -> list[Tensor]:
    """Sums over processes. Replicas take part, so that all processes have the same bits."""
    shares = [_share(*one) for one in asks]
    mesh, replicas = asks[0][0].layout.mesh, asks[0][0].replicas
    dtype = max((t.dtype for t in shares), key=lambda d: torch.finfo(d).bits)
    total = torch.cat([share.flatten().to(dtype) for share in shares])
    torch.distributed.all_reduce(total, group=group_of_mesh(mesh))
    parts = (total / replicas if replicas > 1 else total).split([share.numel() for share in shares])
    found = [part.view(share.shape).to(share.dtype) for part, share in zip(parts, shares, strict=True)]
    return [t.sqrt() if isinstance(ask, Norm) else t for t, (_, ask) in zip(found, asks, strict=True)]


def _share(sharing: Sharing, ask: Ask) -> Tensor:
    """What this process adds to the sum."""
    if isinstance(ask, Norm):
        return ask.value.square()
    if isinstance(ask, RankMean):
        own = rows_of(sharing.layout, sharing.rank)[1]
        return ask.value * (own / sharing.rank) if own else torch.zeros_like(ask.value)
    return ask.value


def _rank_first(sharing: Sharing, stacked: Tensor) -> Tensor:
    """``[m, rank, width]``, whichever side it is; undoes itself."""
    return stacked if sharing.rank_dim == 1 else stacked.mT


class _Chunks(NamedTuple):
    """How the rank is cut up: ``each`` at most, in the first ``holders`` of all processes; ``own`` here."""

    each: int
    holders: int
    own: int
    processes: int

    @classmethod
    def of(cls, sharing: Sharing) -> _Chunks:
        """Those of matrices that are shared out so."""
        layout, rank = sharing.layout, sharing.rank
        each = most_rows(layout, rank)
        return cls(each, -(-rank // each), rows_of(layout, rank)[1], layout.mesh.size(layout.axis))

    def exchange(self, sent: list[Tensor], size: int, layout: Layout, to_rows: bool) -> Tensor:
        """Send ``sent[i][j]`` to process j, and get ``[processes, size]`` from those that have any.

        Args:
            sent: a matrix for each stack, with a row for each receiver; none where there is nothing to send.
            size: entries of all stacks, for one receiver.
            layout: whose processes.
            to_rows: all send, and only those that have a part of the rank receive; else the reverse.
        """
        few = [size] * self.holders + [0] * (self.processes - self.holders)
        own = [size if self.own else 0] * self.processes
        out_sizes, in_sizes = (own, few) if to_rows else (few, own)
        found = sent[0].new_empty(sum(out_sizes))
        flat = (torch.cat(sent, 1) if len(sent) > 1 else sent[0]).flatten()[: sum(in_sizes)]
        group = layout.mesh.get_group(layout.axis)
        torch.distributed.all_to_all_single(found, flat, out_sizes, in_sizes, group=group)
        return found.view(-1, size)


def _columns(asks: Sequence[tuple[Sharing, Ask]]) -> list[Tensor]:
    """From rows to columns: each process sends its part of the rank, cut along the width."""
    chunks = _Chunks.of(asks[0][0])
    stacks = [_rank_first(sharing, ask.value) for sharing, ask in asks]
    widths = [-(-s.shape[2] // chunks.processes) for s in stacks]
    sizes = [s.shape[0] * chunks.each * w for s, w in zip(stacks, widths, strict=True)]
    cut = []
    for stack, width in zip(stacks, widths, strict=True):
        count, own, all_columns = stack.shape
        missing = chunks.processes * width - all_columns, chunks.each - own
        filled = pad(stack, (0, missing[0], 0, missing[1])) if any(missing) else stack
        pieces = filled.view(count, chunks.each, chunks.processes, width)
        cut.append(pieces.permute(2, 0, 1, 3).flatten(1))
    found = chunks.exchange(cut, sum(sizes), asks[0][0].layout, to_rows=False)
    back = []
    for (sharing, _), stack, width, part in zip(asks, stacks, widths, found.split(sizes, 1), strict=True):
        pieces = part.reshape(chunks.holders, stack.shape[0], chunks.each, width)
        whole = pieces.transpose(0, 1).flatten(1, 2)[:, : sharing.rank]
        back.append(_rank_first(sharing, whole.contiguous()))
    return back


def _rows(asks: Sequence[tuple[Sharing, Ask]]) -> list[Tensor]:
    """From columns back to rows."""
    chunks = _Chunks.of(asks[0][0])
    stacks = [_rank_first(sharing, ask.value) for sharing, ask in asks]
    sizes = [s.shape[0] * chunks.each * s.shape[2] for s in stacks]
    missing = chunks.holders * chunks.each - asks[0][0].rank
    filled = [pad(s, (0, 0, 0, missing)) if missing else s for s in stacks]
    cut = [s.unflatten(1, (chunks.holders, chunks.each)).transpose(0, 1).flatten(1) for s in filled]
    found = chunks.exchange(cut, sum(sizes), asks[0][0].layout, to_rows=True)
    back = []
    for (sharing, _), stack, part in zip(asks, stacks, found.split(sizes, 1), strict=True):
        count, _, width = stack.shape
        pieces = part.reshape(len(found), count, chunks.each, width).permute(1, 2, 0, 3)
        whole = (
            pieces.flatten(2) if len(found) else stack.new_empty(count, chunks.each, chunks.processes * width)
        )
        back.append(_rank_first(sharing, whole[:, : chunks.own, : sharing.width]))
    return back
