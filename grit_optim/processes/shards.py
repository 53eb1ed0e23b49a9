"""Matrices whose rows lie on several processes (FSDP2): bringing them together, and back to their owners.

FSDP2 gives each process a chunk of the rows of every parameter, as a ``DTensor``. A step works on these, with
what :mod:`~grit_optim.processes.pieces` exchanges. What needs whole matrices gets those of one shape together
in one flat buffer. Every process then computes the same from the same bits, and keeps its own rows of what
comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_GATHERED: Any = WeakTensorKeyDictionary()


class Layout(NamedTuple):
    """How the processes share a parameter.

    Attributes:
        mesh: the processes, a ``DeviceMesh``.
        placements: one for each dimension of the mesh.
        dim: the parameter's dimension that is shared out; None where each process has all.
        axis: the dimension of the mesh over which it is.
    """

    mesh: Any
    placements: tuple[Any, ...]
    dim: int | None
    axis: int


def is_shared(tensor: object) -> bool:
    """Whether ``tensor`` is a ``DTensor``. Asked by name, so that its module need not be loaded."""
    return type(tensor).__name__ == "DTensor" or type(getattr(tensor, "data", None)).__name__ == "DTensor"


def layout_of(tensor: Any) -> Layout | None:
    """How the processes share ``tensor``; None for an ordinary one."""
    if not is_shared(tensor):
        return None
    shards = [(axis, p.dim) for axis, p in enumerate(tensor.placements) if not p.is_replicate()]
    axis, dim = shards[0] if shards else (0, None)
    return Layout(tensor.device_mesh, tuple(tensor.placements), dim, axis)


def problem(tensor: Any) -> str | None:
    """Why the shards of ``tensor`` cannot be brought together; None if they can, or if it has none."""
    if not is_shared(tensor):
        return None
    parted = [p for p in tensor.placements if not p.is_replicate()]
    if len(parted) > 1 or any(type(p).__name__ != "Shard" for p in parted):
        return (
            f"is shared out as {tuple(tensor.placements)}, by tensor parallelism or in several dimensions. "
            "Use FSDP2 alone (torch.distributed.fsdp.fully_shard), or with replicas (HSDP)"
        )
    if tensor.device.type not in (tensor.device_mesh.device_type, "meta"):
        return (
            f"lies on the {tensor.device.type} while its processes exchange tensors on "
            f"{tensor.device_mesh.device_type} (CPUOffloadPolicy). Leave offload_policy out: A, B and their "
            "moments take little memory"
        )
    return None


TURN_ON_FSDP2 = (
    "Use FSDP2: `fsdp_version: 2` in Accelerate's fsdp_config, fsdp_config={'fsdp_version': 2} in the "
    "TrainingArguments, or torch.distributed.fsdp.fully_shard(model); or DDP"
)


def flattened(model: nn.Module, parameters: Sequence[Tensor]) -> str | None:
    """Why no pair is left of the model's, since a strategy has put them into flat vectors; None if none has.

    Args:
        model: the model.
        parameters: all that the base optimizer holds.
    """
    if not parameters or any(p.dim() > 1 for p in parameters):
        return None
    names = {type(p).__name__ for p in parameters} | {
        name.split(".")[-1] for name, _ in model.named_parameters()
    }
    outside = {id(p) for p in parameters}.isdisjoint(map(id, model.parameters()))
    if names & {"FlatParameter", "_flat_param"} or any(hasattr(p, "ds_id") for p in parameters) or outside:
        return (
            f"all {len(parameters)} parameters of the base optimizer are flat vectors: FSDP1 or DeepSpeed's "
            f"ZeRO has partitioned the model over processes, where no LoRA pair is left. {TURN_ON_FSDP2}"
        )
    return None


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, to read or to write to."""
    return tensor._local_tensor if is_shared(tensor) else tensor.detach()


def address(tensor: Any) -> int:
    """Where the storage of this process's part begins; 0 on the meta device."""
    return local(tensor).untyped_storage().data_ptr()


def together(tensors: Sequence[Any]) -> list[Tensor]:
    """The whole of tensors of one shape and layout, by one message. Every process has to call it."""
    layout = layout_of(tensors[0])
    if layout is None:
        return list(tensors)
    parts = [local(t).detach() for t in tensors]
    if layout.dim is None:
        return parts
    dim, processes = layout.dim, layout.mesh.size(layout.axis)
    rows = tensors[0].shape[dim]
    chunk = most_rows(layout, rows)
    parts = [part.movedim(dim, 0) for part in parts]
    if processes * chunk > 2 * rows:  # most have none, and a gathering would send as much for each of them
        return [tensor.movedim(0, dim) for tensor in _summed(parts, layout, rows)]
    own = parts[0].new_zeros(len(parts), chunk, *parts[0].shape[1:])
    for place, part in zip(own, parts, strict=True):
        place[: part.shape[0]].copy_(part)
    found = own.new_empty(processes * own.numel())
    # torch 2.13 warns of its older name
    gather = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
    gather(found, own.view(-1), group=layout.mesh.get_group(layout.axis))
    whole = found.view(processes, *own.shape).transpose(0, 1).flatten(1, 2)[:, :rows]
    return [tensor.movedim(0, dim) for tensor in whole]


def most_rows(layout: Layout, rows: int) -> int:
    """The most rows that a process has of so many."""
    return -(-rows // layout.mesh.size(layout.axis))


def rows_of(layout: Layout, rows: int) -> tuple[int, int]:
    """The first of the rows that this process has of so many, and how many it has."""
    chunk = most_rows(layout, rows)
    first = min(chunk * layout.mesh.get_local_rank(layout.axis), rows)
    return first, min(chunk, rows - first)


def largest_part(size: int, parameter: Any) -> int:
    """Of so many bytes, shared out as ``parameter`` is, those of the process that has most."""
    layout = layout_of(parameter)
    if layout is None or layout.dim is None:
        return size
    rows = parameter.shape[layout.dim]
    return size * most_rows(layout, rows) // max(1, rows)


def _summed(parts: Sequence[Tensor], layout: Layout, rows: int) -> Tensor:
    """All rows of the parts ``[len(parts), rows, …]``, as the sum over processes of what each has."""
    total = parts[0].new_zeros(len(parts), rows, *parts[0].shape[1:])
    start, _ = rows_of(layout, rows)
    for place, part in zip(total, parts, strict=True):
        place[start : start + part.shape[0]].copy_(part)
    torch.distributed.all_reduce(total, group=layout.mesh.get_group(layout.axis))
    return total


def true_everywhere(answer: Tensor, layout: Layout) -> Tensor:
    """Whether the boolean scalar is true in every process that has a part. Each of them has to call it."""
    if layout.dim is None:
        return answer
    agreed = answer.float()
    group = layout.mesh.get_group(layout.axis)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=group)
    return agreed.bool()


def whole(tensor: Any) -> Tensor:
    """The whole of one tensor. Every process has to call it, if the tensor is shared out."""
    return together([tensor])[0]


def parted(tensors: Sequence[Tensor], like: Sequence[Any]) -> list[Any]:
    """This process's parts of whole tensors, as ``DTensor`` where ``like`` are such."""
    layout = layout_of(like[0]) if like else None
    if layout is None:
        return list(tensors)
    found = []
    for tensor in tensors:
        part = tensor
        if layout.dim is not None:
            part = tensor.narrow(layout.dim, *rows_of(layout, tensor.shape[layout.dim]))
        found.append(part)
    return named(found, like)


def named(parts: Sequence[Tensor], like: Sequence[Any]) -> list[Any]:
    """This process's parts as ``DTensor`` where ``like`` are such."""
    layout = layout_of(like[0]) if like else None
    if layout is None:
        return list(parts)
    from torch.distributed.tensor import DTensor

    return [
        DTensor.from_local(
            part.contiguous(),
            layout.mesh,
            layout.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        for part, parameter in zip(parts, like, strict=True)
    ]


def copy_to(targets: Sequence[Any], values: Sequence[Any]) -> None:
    """Write ``values`` into ``targets``, both ordinary or both this process's parts."""
    torch._foreach_copy_([local(t) for t in targets], [local(v) for v in values])


def group_of_mesh(mesh: Any) -> Any:
    """The group of all processes of a mesh, the replicas of HSDP included."""
    distributed = torch.distributed
    if mesh.size() == distributed.get_world_size():
        return distributed.group.WORLD
    flat = mesh if mesh.ndim == 1 else methodcaller("_flatten")(mesh)  # torch has no public name for it
    return flat.get_group()


def note_gathered(gathered: Tensor, shard: Any) -> None:
    """Take note that a module holds ``gathered`` in the place of ``shard`` while it is used.

    FSDP2 leaves it there after an evaluation, until the next backward pass.
    """
    if _GATHERED.get(gathered) is not shard:
        _GATHERED[gathered] = shard


def shard_of(tensor: Tensor) -> Any:
    """What a module's ``tensor`` is this process's gathered copy of; else itself."""
    return _GATHERED.get(tensor, tensor) if len(_GATHERED) else tensor
