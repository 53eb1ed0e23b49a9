"""Plans of which ranks to keep, and reductions by hand."""

import pytest
import tiny
import torch
from budgets import kept_parameters, pairs_of


def test_a_plan_is_what_happens_and_changes_nothing():
    model = tiny.llama()
    optimizer = tiny.grit(model, min_lora_rank=0)
    tiny.train(model, optimizer, 5)
    before = tiny.weights(model)
    plan = optimizer.plan_ranks(0.4)
    assert all(torch.equal(value, before[name]) for name, value in tiny.weights(model).items())
    assert set(optimizer.ranks().values()) == {4}
    done = optimizer.reduce_ranks_(0.4)
    assert dict(done) == dict(plan)
    assert done.predicted_loss == pytest.approx(plan.predicted_loss, rel=1e-4)
    assert done.predicted_loss > 0
    assert optimizer.telemetry()["predicted_cost"] == pytest.approx(done.predicted_loss, rel=1e-5)
    further = optimizer.plan_ranks(0.2)
    assert further.predicted_loss > done.predicted_loss
    tiny.train(model, optimizer, 3)
    assert dict(optimizer.ranks()) == dict(plan), "the default mode leaves alone what was given up"
    assert kept_parameters(model) == plan.parameters


def test_ranks_by_name():
    model = tiny.llama()
    optimizer = tiny.grit(model)
    tiny.train(model, optimizer, 3)
    first, second = list(optimizer.ranks())[:2]
    report = optimizer.reduce_ranks_({first: 0, second: 3})
    assert list(report.values()) == [0, 3] + [4] * 12


BAD = {
    "unknown site": (
        {"q_proj": 2},
        ValueError,
        "unknown site 'q_proj'. .*14 sites are the keys of optimizer.ranks",
    ),
    "rank too high": (
        lambda o: {next(iter(o.ranks())): 5},
        ValueError,
        "has rank 4; it can keep a whole number from 0",
    ),
    "below the floor": (
        0.2,
        ValueError,
        "min_lora_rank=4 keeps 1,984; raise the budget, or lower min_lora_rank",
    ),
    "more than all": (5000, ValueError, "more than the 1,984 parameters"),
    "zero": (0, ValueError, "at least 1"),
    "share above one": (1.5, ValueError, r"\(0, 1\]"),
    "a word": ("half", TypeError, "a share of the adapter's parameters"),
}


@pytest.mark.parametrize(("ranks", "error", "message"), BAD.values(), ids=BAD.keys())
def test_impossible_reductions(ranks, error, message):
    model = tiny.llama()
    optimizer = tiny.grit(model)
    tiny.train(model, optimizer, 3)
    with pytest.raises(error, match=message):
        optimizer.reduce_ranks_(ranks(optimizer) if callable(ranks) else ranks)
    assert set(optimizer.ranks().values()) == {4}


def test_nothing_is_reduced_before_anything_is_known():
    model = tiny.llama()
    optimizer = tiny.grit(model, min_lora_rank=0)
    with pytest.raises(
        ValueError, match=r"nothing is known yet of the curvature of 14 site\(s\).*export_adapter"
    ):
        optimizer.plan_ranks(0.5)


def test_the_papers_projections_give_up_no_rank():
    model = tiny.llama()
    optimizer = tiny.grit(model, reprojection="two_sided")
    tiny.train(model, optimizer, 3)
    for call in (lambda: optimizer.reduce_ranks_(0.5), optimizer.shrink_):
        with pytest.raises(ValueError, match="for good"):
            call()


@pytest.mark.parametrize(
    ("now", "said"), [("none", True), ("balanced", True), ("none", False)], ids=["none", "balanced", "older"]
)
def test_ranks_of_the_papers_projections_are_not_taken_for_given_up(now, said):
    """A state saved with them, loaded without: every row is in use, and none may be cleared.

    An older state does not say which reprojection it was saved with; "balanced" is then taken for it.
    """
    model = tiny.llama()
    optimizer = tiny.grit(model, reprojection="two_sided", reprojection_freq=2, reprojection_k=2)
    tiny.train(model, optimizer, 4)
    assert set(optimizer.ranks().values()) == {2}
    state = optimizer.state_dict()
    if not said:
        del state["grit"]["reprojection"]
    optimizer.close()
    other = tiny.grit(model, reprojection=now, reprojection_freq=100)
    other.load_state_dict(state)
    assert set(other.ranks().values()) == {4}
    tiny.train(model, other, 1, first=4)
    assert all(torch.count_nonzero(a[2:]) == a[2:].numel() for _, a, _ in pairs_of(model))
