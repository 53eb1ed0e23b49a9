"""Sites stacked for batched algebra.

A :class:`Bucket` holds the sites of one rank on one device; their factors form tensors ``[S, r, r]``. Within
it, a :class:`Group` holds the matrices of one side (A or B) that share a shape and a dtype. An operation on
all of them is one batched product, never a loop with one kernel per site. Which parameter group of the base
optimizer holds a matrix may change at any time. It is looked up whenever it is needed
(:meth:`Group.by_settings`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from grit_optim.lora.site import Site
from grit_optim.processes import shards
from grit_optim.processes.pieces import Columns, Rows, Sharing, answers

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")

STACKS = 10
"""Stacks of what is worked on together that a step makes at most beside it."""
MEMORY = 64 * 10**6
"""Bytes that these may take up beyond one stack of everything, which AdamW's own step makes on a GPU."""
_SUBSETS_KEPT = 64


@dataclass(eq=False)
class Group:
    """Matrices of one side and shape: ``m`` of them, stacked as ``[m, r, d]`` (A) or ``[m, d, r]`` (B).

    Attributes:
        side: which matrix of the pair these are.
        parameters: the parameters that hold the matrices, in their order: m of them, or m / ``experts``.
        index: position of each matrix's site in the bucket, ``[m]``, on the bucket's device.
        positions: ``index`` as Python numbers, to be had without waiting for the device.
        experts: how many matrices each parameter holds, as PEFT stacks those of a layer's experts: an A has
            their rows one after another, ``[experts·r, d]``, a B their columns in turns, ``[d, r·experts]``.
        sharing: how processes share the matrices out, where a stack holds this process's rows alone; else
            None.
    """

    side: Side
    parameters: list[Tensor]
    index: Tensor
    positions: tuple[int, ...] = ()
    experts: int = 1
    sharing: Sharing | None = None
    _subsets: dict[tuple[int, ...], Group] = field(default_factory=dict, repr=False)

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors, in the parameters' shape, as matrices ``[m, rows, columns]``, in fp32 or better.

        Those of which each process has some rows are brought together: every process has to call it. Not so
        with :attr:`sharing`.
        """
        plain = shards.together(tensors) if self.sharing is None else [shards.local(t) for t in tensors]
        stacked = torch.stack([t if t.dim() == 2 else t.flatten(1) for t in plain]).detach()
        if self.experts > 1 and self.side == "A":
            stacked = stacked.view(len(tensors) * self.experts, -1, stacked.shape[-1])
        elif self.experts > 1:
            by_expert = stacked.view(*stacked.shape[:2], -1, self.experts).permute(0, 3, 1, 2)
            stacked = by_expert.flatten(0, 1)
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    def split(self, stacked: Tensor) -> list[Tensor]:
        """``[m, rows, columns]`` as each parameter is: undoes :meth:`stack`, but for the dtype."""
        if self.experts > 1 and self.side == "A":
            stacked = stacked.reshape(-1, self.experts * stacked.shape[1], stacked.shape[2])
        elif self.experts > 1:
            by_expert = stacked.unflatten(0, (-1, self.experts)).permute(0, 2, 3, 1)
            stacked = by_expert.reshape(*by_expert.shape[:2], -1)
        if self.sharing is not None:
            own = [m.view(shards.local(p).shape) for m, p in zip(stacked, self.parameters, strict=True)]
            return shards.named(own, self.parameters)
        found = [matrix.view(p.shape) for matrix, p in zip(stacked, self.parameters, strict=True)]
        return shards.parted(found, self.parameters)

    def unstack(self, stacked: Tensor) -> list[Tensor]:
        """As :meth:`split`, in the parameters' dtype."""
        return self.split(stacked.to(self.parameters[0].dtype))

    def spread(self, value: Tensor | float) -> Tensor | float:
        """A number for each parameter ``[…, 1, 1]``, or one for all, as one for each matrix ``[m, 1, 1]``."""
        if self.experts == 1 or not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return value.repeat_interleave(self.experts, 0)

    def apply(self, operators: Tensor, stacked: Tensor) -> Tensor:
        """Multiply on the rank side by each site's operator ``[S, r, r]``: ``M X`` for A, ``X M`` for B."""
        chosen = operators[self.index].to(stacked.dtype)
        return chosen @ stacked if self.side == "A" else stacked @ chosen

    def with_all_of_the_rank(self, stacked: Tensor) -> Tensor:
        """A stack as it can be multiplied on the rank's side: with :attr:`sharing`, of some columns of A.

        Every process has to call it, and :meth:`with_own_rows` with what comes out.
        """
        return answers([(self.sharing, Columns(stacked))])[0]

    def with_own_rows(self, stacked: Tensor) -> Tensor:
        """Undoes :meth:`with_all_of_the_rank`."""
        return answers([(self.sharing, Rows(stacked))])[0]

    def masked(self, stacked: Tensor, mask: Tensor) -> Tensor:
        """``[m, rows, columns]``, exactly zero on rank coordinates outside each site's mask ``[S, r]``."""
        chosen = mask[self.index]
        return torch.where(chosen[:, :, None] if self.side == "A" else chosen[:, None, :], stacked, 0.0)

    def subset(self, positions: Sequence[int]) -> Group:
        """The group of some of its parameters, given by their positions in ``parameters``, in order.

        It is kept: the same few recur in every step, and copying positions to a GPU would wait for it. A run
        of members needs no copy.
        """
        key = tuple(positions)
        if len(key) == len(self.parameters):
            return self
        if key not in self._subsets:
            if len(self._subsets) >= _SUBSETS_KEPT:
                self._subsets.clear()
            places = tuple(self.positions[i] for i in self.matrices(key))
            first = self.matrices(key[:1])[0] if key else 0
            if places == self.positions[first : first + len(places)]:
                index = self.index[first : first + len(places)]
            else:
                index = torch.tensor(places, dtype=torch.int64, device=self.index.device)
            chosen = [self.parameters[i] for i in key]
            self._subsets[key] = Group(self.side, chosen, index, places, self.experts, self.sharing)
        return self._subsets[key]

    def pieces(self, most: int) -> list[Group]:
        """The group in runs of members whose stacks take up at most so many bytes, or of one member."""
        count = len(self.parameters)
        size = max(1, most * count // self.bytes)
        return [self.subset(range(i, min(i + size, count))) for i in range(0, count, size)]

    @property
    def bytes(self) -> int:
        """What a stack of the matrices takes up, in the process that has most of them."""
        whole = sum(p.numel() * max(4, p.element_size()) for p in self.parameters)
        return whole if self.sharing is None else shards.largest_part(whole, self.parameters[0])

    def matrices(self, positions: Sequence[int]) -> list[int]:
        """Places in a stack of the matrices of some parameters, given by their positions."""
        return [i * self.experts + e for i in positions for e in range(self.experts)]

    def by_settings(self, settings: Mapping[int, dict[str, Any]]) -> list[tuple[dict[str, Any], Group]]:
        """The members that share a parameter group of the base, with that group, in order of occurrence.

        Args:
            settings: ``id(parameter)`` to the parameter group that holds it now. Members that are in none are
                left out: the base does not step them.
        """
        members: dict[int, list[int]] = {}
        for position, parameter in enumerate(self.parameters):
            if (found := settings.get(id(parameter))) is not None:
                members.setdefault(id(found), []).append(position)
        return [(settings[id(self.parameters[m[0]])], self.subset(m)) for m in members.values()]

    def with_gradient(self) -> Group | None:
        """The group of the members that have a gradient now; None if none has."""
        present = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        return self.subset(present) if present else None

    def gradients(self) -> list[Tensor]:
        """The gradients of the members that have one, in order; all do in :meth:`with_gradient`'s group."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def write(self, stacked: Tensor) -> None:
        """Set the m parameters to the matrices ``[m, rows, columns]``, in place."""
        shards.copy_to(self.parameters, self.unstack(stacked))

    @cached_property
    def in_parts(self) -> Group:
        """The group with stacks of this process's rows; itself where it has all, or rows of many experts."""
        layout = shards.layout_of(self.parameters[0])
        if layout is None or layout.dim not in (0, 1) or self.experts > 1:
            return self
        rank = self.parameters[0].shape[self.rank_dim - 1]
        sharing = Sharing(layout, self.rank_dim, rank, self.width)
        return replace(self, sharing=sharing, _subsets={})

    @property
    def width(self) -> int:
        """Columns of A, rows of B: the size of the dimension that is not the rank."""
        rows, *columns = self.parameters[0].shape
        return math.prod(columns) if self.side == "A" else rows

    @property
    def rank_dim(self) -> int:
        """The dimension of a stacked matrix that runs over the rank."""
        return 1 if self.side == "A" else 2


@dataclass(eq=False)
class Bucket:
    """The ``S`` sites of one rank ``r`` on one device, with the groups of their matrices.

    Attributes:
        sites: the sites, in the order of every ``[S, …]`` tensor.
        rank: r, the number of rows of A.
        device: where the sites' matrices lie.
        groups: their matrices, those of A before those of B.
    """

    sites: list[Site]
    rank: int
    device: torch.device
    groups: list[Group] = field(default_factory=list)

    @cached_property
    def direction_size(self) -> Tensor:
        """Parameters of one direction of each site, a row of A and a column of B: ``[S]``, int64."""
        sizes = [0] * len(self.sites)
        for group in self.groups:  # not of the sites: an adapter may have been deleted since
            for place, position in enumerate(group.positions):
                entries = group.parameters[place // group.experts].numel() // group.experts
                sizes[position] += entries // self.rank
        return torch.tensor(sizes, dtype=torch.int64, device=self.device)

    @cached_property
    def narrower(self) -> Tensor:
        """Columns of A or rows of B, whichever are fewer: ``[S]``, fp32."""
        widths = [min(site.a.shape[1:].numel(), site.b.shape[0]) for site in self.sites]
        return torch.tensor(widths, dtype=torch.float32, device=self.device)

    @cached_property
    def fixed(self) -> Tensor:
        """The sites whose coordinates cannot be changed, boolean ``[S]``."""
        return torch.tensor([site.fixed for site in self.sites], dtype=torch.bool, device=self.device)

    def names(self) -> list[str]:
        """The sites' names, in the order of every ``[S, …]`` tensor."""
        return [site.name for site in self.sites]


def most_at_once(groups: Iterable[Group]) -> int:
    """Bytes of stacked matrices of these groups that are worked on together: all while they are few.

    So a step's own memory and the number of its kernels are bounded, whatever the size.
    """
    return max(1, (MEMORY + sum(group.bytes for group in groups)) // STACKS)


def in_pieces(groups: Sequence[Group]) -> list[Group]:
    """The groups in pieces of as much as is worked on together, in order."""
    most = most_at_once(groups)
    return [piece for group in groups for piece in group.pieces(most)]


def build_buckets(sites: Iterable[Site]) -> list[Bucket]:
    """Stack the sites by rank and device, in the order in which each combination first occurs.

    Args:
        sites: the sites, in the model's order.
    """
    buckets: dict[tuple[int, torch.device], Bucket] = {}
    for site in sites:
        key = (site.rank, site.a.device)
        buckets.setdefault(key, Bucket([], *key)).sites.append(site)
    for bucket in buckets.values():
        bucket.groups = [*_groups(bucket, "A"), *_groups(bucket, "B")]
    return list(buckets.values())


def _groups(bucket: Bucket, side: Side) -> list[Group]:
    members: dict[tuple[Any, ...], dict[int, tuple[Tensor, list[int]]]] = {}
    for position, site in enumerate(bucket.sites):
        parameter = site.a if side == "A" else site.b
        layout = shards.layout_of(parameter)
        alike = members.setdefault((parameter.shape, parameter.dtype, layout, site.experts), {})
        alike.setdefault(id(parameter), (parameter, []))[1].append(position)
    groups = []
    for (*_, experts), found in members.items():
        positions = tuple(position for _, places in found.values() for position in places)
        index = torch.tensor(positions, dtype=torch.int64, device=bucket.device)
        groups.append(Group(side, [p for p, _ in found.values()], index, positions, experts))
    return groups


def check_distinct(sites: Sequence[Site]) -> None:
    """Refuse sites that share a name or a matrix.

    Raises:
        ValueError: two sites have the same name, the same A or the same B.
    """
    for what, keys in (
        ("the same name", [site.name for site in sites]),
        ("the same A", [(id(site.a), site.expert) for site in sites]),
        ("the same B", [(id(site.b), site.expert) for site in sites]),
    ):
        first: dict[object, int] = {}
        for i, key in enumerate(keys):
            if (other := first.setdefault(key, i)) != i:
                raise ValueError(
                    f"sites {other} ({sites[other].name!r}) and {i} ({sites[i].name!r}) have {what}. A name "
                    "keys a site's state in checkpoints, and a pair is stepped once. Give each pair once, "
                    "under a name of its own"
                )


def check_real(sites: Iterable[Site]) -> None:
    """Refuse complex matrices: the factors and every change of coordinates are of real numbers.

    Raises:
        TypeError: a site's A or B is complex.
    """
    for site in sites:
        for name, matrix in (("A", site.a), ("B", site.b)):
            if matrix.is_complex():
                raise TypeError(
                    f"site {site.name!r} has a complex {name} ({matrix.dtype}); GRIT works on real adapters "
                    "alone. Freeze it, leave it to another optimizer, or train its real and imaginary parts "
                    "as pairs of their own"
                )
