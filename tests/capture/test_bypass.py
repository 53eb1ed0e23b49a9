"""Whatever goes around the optimizer is said once, within the first steps, with the remedy."""

import copy
import warnings
from pathlib import Path

import pytest
import tiny
import torch

from grit_optim.capture.bypass import PATIENCE


def go_around(model, stepped, steps, clear):
    for seed in range(steps):
        tiny.loss_of(model, seed).backward()
        stepped.step()
        clear()


def around(caught):
    return [w for w in caught if "without GritOptimizer.step()" in str(w.message)]


@pytest.mark.parametrize("to_none", [True, False], ids=["cleared", "zeroed"])
def test_a_trainer_with_an_optimizer_of_its_own_is_told_once(to_none):
    """What the Trainer does under DeepSpeed: `optimizers=` is dropped, and another one made."""
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    other = tiny.adamw(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go_around(model, other, 3 * PATIENCE, lambda: other.zero_grad(set_to_none=to_none))
    assert optimizer.telemetry()["steps"] == 0
    assert len(around(caught)) == 1
    assert "drops optimizers= under DeepSpeed" in str(around(caught)[0].message)


def test_a_loop_that_steps_the_base_is_told():
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    with pytest.warns(UserWarning, match=r"calls optimizer\.base\.step\(\)"):
        go_around(model, optimizer.base, PATIENCE + 1, optimizer.base.zero_grad)


def test_an_optimizer_in_the_backward_pass_is_noticed_by_the_gradients_it_takes_away():
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)

    def layerwise(p):
        p.data = p.data - 0.01 * p.grad  # leaves no trace in the version counter
        p.grad = None

    for p in tiny.trained(model):
        p.register_post_accumulate_grad_hook(layerwise)

    def loop():
        for seed in range(PATIENCE + 1):
            tiny.loss_of(model, seed).backward()

    with pytest.warns(UserWarning, match="step inside the backward pass"):
        loop()
    assert optimizer.telemetry()["folds"] == 0


def test_the_trainer_that_trains_another_model_is_told():
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    wrapped = copy.deepcopy(model)

    def loop():
        for seed in range(5):
            tiny.loss_of(wrapped, seed).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"none of its 7 LoRA site.*for_trainer") as told:
        loop()
    assert Path(told[-1].filename) == Path(__file__)  # the line that called step()


def accumulate(model, optimizer):
    for seed in range(12):
        tiny.loss_of(model, seed).backward()
        if seed % 6 == 5:
            optimizer.step()
            model.zero_grad()


def overflow(model, optimizer):
    """A GradScaler skips steps, and the Trainer clears by model.zero_grad()."""
    for seed in range(8):
        (tiny.loss_of(model, seed) * float("inf")).backward()
        model.zero_grad()


def evaluate_between(model, optimizer):
    for seed in range(6):
        tiny.loss_of(model, seed).backward()
        tiny.loss_of(model, seed)  # a graph that nobody differentiates
        with torch.no_grad():
            tiny.loss_of(model, seed)
        optimizer.step()
        model.zero_grad()


def reload(model, optimizer):
    for seed in range(6):
        tiny.train(model, optimizer, 1, first=seed)
        model.load_state_dict(model.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("loop", [accumulate, overflow, evaluate_between, reload])
def test_honest_loops_hear_nothing(loop):
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loop(model, optimizer)


def test_a_closed_optimizer_says_nothing():
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)
    optimizer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        go_around(model, optimizer.base, 6, optimizer.base.zero_grad)
