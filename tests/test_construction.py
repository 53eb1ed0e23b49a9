"""A construction that fails, wherever and for whatever reason, leaves model and base as they were."""

import copy
import sys
import warnings
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


def raising_at(number, call):
    """Run ``call``, raising in the package's function call of that number; says whether it came so far."""
    counted = 0

    def trace(frame, event, argument):
        nonlocal counted
        code = frame.f_code  # a generator that is closed early swallows what is raised in it
        ours = code.co_filename.startswith(PACKAGE) and code.co_name != "<genexpr>"
        if event == "call" and ours and counted <= number:
            counted += 1
            if counted > number:
                raise Injected
        return

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Injected:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_an_error_at_any_call_leaves_no_trace(name):
    lora, options = CASES[name]
    model = tiny.llama(layers=1, **{"target_modules": ["q_proj", "up_proj"], **lora})
    base = tiny.adamw(model)
    untouched, groups = hooks(model), copy.deepcopy(base.state_dict())
    number = 0
    while raising_at(number, lambda: GritOptimizer(base, model, **options)):
        assert hooks(model) == untouched, f"call {number}"
        assert base.state_dict() == groups
        number += 1
    assert number > 100
    assert hooks(model) != untouched, "the one that was built"


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
