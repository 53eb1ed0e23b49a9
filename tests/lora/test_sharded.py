"""Pairs that processes share out: those that come together for a step, and those that are refused."""

from dataclasses import replace

import pairs
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from grit_optim.lora.buckets import Group
from grit_optim.processes import shards


@pytest.fixture
def group():
    """A process group of four of which three are not there: their messages change nothing."""
    torch.distributed.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def shared(model, mesh, placements, device="cpu"):
    """The model with B of its first pair as a DTensor."""
    module = model.get_base_model().first.lora_B["default"]
    part = DTensor.from_local(torch.zeros(2, 4, device=device), mesh, placements, run_check=False)
    module.weight = torch.nn.Parameter(part)
    module = model.get_base_model().first.lora_A["default"]
    part = DTensor.from_local(torch.zeros(1, 5, device=device), mesh, placements, run_check=False)
    module.weight = torch.nn.Parameter(part)
    return model


def test_tensor_parallel_pairs_are_refused(group):
    mesh = init_device_mesh("cpu", (2, 2))
    with pytest.raises(NotImplementedError, match=r"first.default' is shared out as .*Use FSDP2 alone"):
        pairs.wrapped(shared(pairs.network(), mesh, (Shard(0), Shard(0))))


def test_offloaded_pairs_are_refused(group, monkeypatch):
    mesh = init_device_mesh("cpu", (4,))
    model = shared(pairs.network(), mesh, (Shard(0),))
    monkeypatch.setattr(type(mesh), "device_type", property(lambda self: "cuda"))
    with pytest.raises(NotImplementedError, match=r"lies on the cpu while .* on cuda \(CPUOffloadPolicy\)"):
        pairs.wrapped(model)


def test_processes_that_share_matrices_cannot_train_apart(group):
    model = shared(pairs.network(), init_device_mesh("cpu", (4,)), (Shard(0),))
    optimizer = pairs.wrapped(model, process_group=None)
    with pytest.raises(ValueError, match="is not the processes that FSDP2 shares A and B out to"):
        optimizer.step()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8])
def test_parts_are_those_of_torch_and_come_together(group, rows):
    """A process's own rows, also where it has none, or fewer than others."""
    mesh, whole = init_device_mesh("cpu", (4,)), torch.randn(rows, 3)
    chunks = whole.chunk(4)
    own = chunks[1] if len(chunks) > 1 else whole[:0]
    like = DTensor.from_local(own, mesh, (Shard(0),), run_check=False, shape=whole.shape, stride=(3, 1))
    (part,) = shards.parted([whole], [like])
    assert torch.equal(shards.local(part), own)
    assert part.shape == whole.shape
    assert shards.together([like])[0].shape == whole.shape


def test_replicated_parameters_need_no_message(group):
    mesh, whole = init_device_mesh("cpu", (4,)), torch.randn(3, 2)
    like = DTensor.from_local(whole, mesh, (Replicate(),), run_check=False)
    assert torch.equal(shards.whole(like), whole)
    assert torch.equal(shards.local(shards.parted([whole], [like])[0]), whole)


def test_which_matrices_are_worked_on_in_parts(group):
    """Those that are shared out; not those that every process has, nor rows of many experts."""
    mesh = init_device_mesh("cpu", (4,))
    whole = DTensor.from_local(torch.zeros(3, 8), mesh, (Replicate(),), run_check=False)
    of_rank = DTensor.from_local(torch.zeros(1, 8), mesh, (Shard(0),), run_check=False)
    of_width = DTensor.from_local(torch.zeros(2, 4), mesh, (Shard(0),), run_check=False)
    index = torch.zeros(1, dtype=torch.int64)
    groups = [Group("A", [whole], index), Group("A", [of_rank], index), Group("B", [of_width], index)]
    for one in (groups[0], Group("A", [torch.zeros(3, 8)], index), replace(groups[1], experts=2)):
        assert one.in_parts is one
    for one, split in zip(groups[1:], (True, False), strict=True):
        part = one.in_parts
        assert (part.sharing.of_rank, part.sharing.rank, part.sharing.width) == (split, 4, 8)
        assert part.bytes * 4 == one.bytes == 4 * 32
        assert part.stack(part.parameters).shape == (1, *shards.local(part.parameters[0]).shape)
        (back,) = part.split(part.stack(part.parameters))
        assert back.shape == one.parameters[0].shape


def test_flat_parameters_are_refused_with_the_line_that_turns_fsdp2_on():
    """What FSDP1 makes of them before an optimizer sees them."""
    model = pairs.network()
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in pairs.trained(model)]))
    model.register_parameter("_flat_param", flat)
    with pytest.raises(NotImplementedError, match=r"partitioned.*fsdp_version.*fully_shard\(model\)"):
        pairs.GritOptimizer(torch.optim.AdamW([flat], lr=1e-2), model)


def test_flat_parameters_that_come_later_are_refused_too():
    """What ZeRO puts into the groups of an optimizer that it is given."""
    model = pairs.network()
    optimizer = pairs.wrapped(model)
    pairs.train(model, optimizer, 1)
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in pairs.trained(model)]))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(NotImplementedError, match="DeepSpeed's ZeRO has partitioned the model"):
        optimizer.step()
