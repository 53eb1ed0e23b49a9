"""What is recorded in which step does not depend on what is tapped when."""

import copy

import pytest
import torch
from pairs import assert_same, everything, loss_of, network, train, wrapped
from tiny import trained

PERIODS = {"cov_update_freq": 3, "max_tokens": 5}


def shrink(model, optimizer):
    optimizer.shrink_()


def another_group(model, optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("change", [shrink, another_group])
@pytest.mark.parametrize("at", [2, 3])
def test_a_run_goes_on_as_if_nothing_had_been_tapped_anew(change, at):
    ends = []
    for changes in (True, False):
        model = network()
        optimizer = wrapped(model, **PERIODS)
        train(model, optimizer, at)
        if changes:
            change(model, optimizer)
        train(model, optimizer, 5, first=at)
        ends.append([list(trained(model)), optimizer.state_dict()["grit"]["sites"]])
    assert optimizer.telemetry()["folds"] == 1 + len([s for s in range(1, at + 5) if (s - 1) % 3 == 0])
    assert_same(*ends)


@pytest.mark.parametrize("change", [shrink, another_group])
def test_continued_and_resumed_runs_are_equal(change):
    model = network()
    optimizer = wrapped(model, **PERIODS)
    train(model, optimizer, 3)
    change(model, optimizer)
    resumed = copy.deepcopy(model)
    other = wrapped(resumed, **PERIODS)
    if change is another_group:
        another_group(resumed, other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 4, first=3)
    train(resumed, other, 4, first=3)
    assert_same(everything(resumed, other), everything(model, optimizer))


@pytest.mark.parametrize("when", ["after the forward pass", "after the backward pass"])
def test_what_was_seen_before_a_change_counts_after_it(when):
    ends = []
    for changes in (True, False):
        model = network()
        optimizer = wrapped(model)
        loss = loss_of(model, 0)
        if changes and when == "after the forward pass":
            another_group(model, optimizer)
        loss.backward()
        if changes and when == "after the backward pass":
            another_group(model, optimizer)
        optimizer.step()
        assert set(optimizer.telemetry()["samples"].values()) == {8}
        ends.append([list(trained(model)), optimizer.state_dict()["grit"]["sites"]])
    assert_same(*ends)
