"""Several processes: refused, since each would turn the same averaged gradients by factors of its own."""

import pytest
import tiny
import torch


@pytest.fixture
def _two_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


@pytest.mark.usefixtures("_two_processes")
@pytest.mark.parametrize(
    "options", [{}, {"precondition": "none", "reprojection": "balanced"}], ids=["default", "reprojection"]
)
def test_a_step_that_would_use_curvature_is_refused_before_anything_moves(options):
    model = tiny.llama()
    optimizer = tiny.grit(model, **options)
    before = tiny.weights(model)
    tiny.loss_of(model).backward()
    with pytest.raises(NotImplementedError, match=r"2 processes train together.*precondition='none'"):
        optimizer.step()
    assert len(before) == 28
    assert all(torch.equal(value, before[name]) for name, value in tiny.weights(model).items())


@pytest.mark.usefixtures("_two_processes")
def test_the_base_alone_is_not():
    models = [tiny.llama(), tiny.llama()]
    tiny.train(models[0], tiny.grit(models[0], precondition="none"), 2)
    tiny.train(models[1], tiny.adamw(models[1]), 2)
    expected = tiny.weights(models[1])
    assert all(torch.equal(value, expected[name]) for name, value in tiny.weights(models[0]).items())
