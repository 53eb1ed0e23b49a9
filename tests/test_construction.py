"""A construction that fails, wherever and for whatever reason, leaves model and base as they were."""

import copy
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

import grit_optim
from grit_optim import GritOptimizer

PACKAGE = str(Path(grit_optim.__file__).parent)
BUDGET = {"reprojection": "balanced", "rank_budget": 0.5, "rank_budget_steps": 4, "min_lora_rank": 0}
# name: LoRA, options. The last warn at different places.
CASES = {
    "plain": ({}, {}),
    "watches the model's losses": ({}, {**BUDGET, "rank_budget_schedule": "adaptive"}),
    "an embedding that cannot be tapped": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"capture": "taps"},
    ),
    "ranks that cannot be saved": ({"use_dora": True}, BUDGET),
    "options without effect": ({}, {"precondition": "none", "kfac_power": 0.7}),
}


class Injected(BaseException):
    """Raised where the test says."""


def hooks(model):
    """Every hook of every module and parameter."""
    kinds = [name for name in vars(torch.nn.Module()) if "hooks" in name]
    found = [(name, kind, len(getattr(m, kind))) for name, m in model.named_modules() for kind in kinds]
    return found, [len(p._backward_hooks or ()) for p in model.parameters()]


def traced(call, at_a_call):
    """What ``call`` returns; ``at_a_call`` gets the code of each function of the package that is entered."""

    def trace(frame, event, argument):
        code = frame.f_code  # a generator that is closed early swallows what is raised in it
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<genexpr>":
            at_a_call(code)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def raising_at(wanted, number, call):
    """Run ``call``, raising in the call of that number of the function with the code ``wanted``."""
    left = number

    def raise_there(code):
        nonlocal left
        if code is wanted:
            left -= 1
            if left == 0:
                raise Injected

    with pytest.raises(Injected):
        traced(call, raise_there)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_an_error_in_any_function_leaves_no_trace(name):
    """At its first, second, middle and last call: all calls of all of them take minutes, and are alike."""
    lora, options = CASES[name]
    model = tiny.llama(layers=1, **{"target_modules": ["q_proj", "up_proj"], **lora})
    base = tiny.adamw(model)
    untouched, groups = hooks(model), copy.deepcopy(base.state_dict())

    def build():
        return GritOptimizer(base, model, **options)

    calls = Counter()
    optimizer = traced(build, lambda code: calls.update([code]))
    assert hooks(model) != untouched
    optimizer.close()
    assert len(calls) > 100
    for code, count in calls.items():
        for number in sorted({1, min(2, count), (count + 1) // 2, count}):
            raising_at(code, number, build)
            assert hooks(model) == untouched, f"{code.co_name}, call {number}"
            assert base.state_dict() == groups


@pytest.mark.parametrize("name", CASES)
def test_a_warning_that_is_an_error_leaves_no_trace(name):
    lora, options = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.llama(layers=1, **{"target_modules": ["q_proj", "up_proj"], **lora})
        base, untouched = tiny.adamw(model), hooks(model)
        optimizer = GritOptimizer(base, model, **options)
        assert hooks(model) != untouched
        optimizer.close()
    assert hooks(model) == untouched
    warns = name not in ("plain", "watches the model's losses")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if warns:
            with pytest.raises(UserWarning):
                GritOptimizer(base, model, **options)
        else:
            GritOptimizer(base, model, **options).close()
    assert hooks(model) == untouched
