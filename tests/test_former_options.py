"""Former names of options: each gives the options of the new spelling, or is refused with what to do."""

import copy

import pytest
import tiny
import torch

from grit_optim import GritOptimizer, for_trainer
from grit_optim.options import DECLARED
from grit_optim.options.former import FORMER, GONE, translated

BALANCED = {"reprojection": "balanced"}
WAY = {"rank_budget_steps": 8, "min_lora_rank": 1, **BALANCED}

SAME = {
    "adaptation": (
        {**BALANCED, "enable_rank_adaptation": True},
        {**BALANCED, "rank_adaptation_threshold": 0.99},
    ),
    "adaptation by a threshold": (
        {**BALANCED, "enable_rank_adaptation": True, "rank_adaptation_threshold": 0.8},
        {**BALANCED, "rank_adaptation_threshold": 0.8},
    ),
    "a threshold that does not count": (
        {**BALANCED, "enable_rank_adaptation": False, "rank_adaptation_threshold": 0.8},
        BALANCED,
    ),
    "natural length": (
        {"precondition": "inverse", "preserve_norm": False},
        {"precondition": "inverse", "step_length": "natural"},
    ),
    "natural length, said twice": (
        {"precondition": "inverse", "preserve_norm": False, "step_length": "natural"},
        {"precondition": "inverse", "step_length": "natural"},
    ),
    "the gradient's length": (
        {"precondition": "inverse", "preserve_norm": True},
        {"precondition": "inverse"},
    ),
    "a falling budget": (
        {**WAY, "rank_budget_start": 0.9, "rank_budget": 0.5},
        {**WAY, "rank_budget": (0.9, 0.5)},
    ),
    "a falling budget in parameters": (
        {**WAY, "rank_budget_start": 900, "rank_budget": 0.5, "rank_regrowth": False},
        {**WAY, "rank_budget": (900, 0.5)},
    ),
    "a rising budget": (
        {**WAY, "rank_budget_start": 0.3, "rank_budget": 0.9, "rank_regrowth": True},
        {**WAY, "rank_budget": (0.3, 0.9)},
    ),
    "no regrowth": (
        {**BALANCED, "rank_budget": 0.9, "rank_regrowth": False},
        {**BALANCED, "rank_budget": 0.9},
    ),
    "no start": (
        {**BALANCED, "rank_budget": 0.9, "rank_budget_start": None},
        {**BALANCED, "rank_budget": 0.9},
    ),
}


def built(options):
    model = tiny.llama(layers=1)
    return tiny.grit(model, **{"min_lora_rank": 1, **options}).options


@pytest.mark.parametrize(("former", "new"), SAME.values(), ids=SAME.keys())
def test_a_former_name_gives_the_options_of_the_new_one(former, new):
    assert built(former) == built(new)
    assert not any(name in built(former).as_dict() for name in FORMER)


def test_every_former_name_that_still_means_something_is_compared():
    assert {name for former, _ in SAME.values() for name in former} - set(DECLARED) == {*FORMER} - {*GONE}
    assert not {*FORMER} & {*DECLARED}


REFUSED = [
    # what is given, error, what the message says
    ({"caution": 0.7}, TypeError, "caution is a constant of each mode now, .*leave it out"),
    ({"gradient_share": 0.4}, TypeError, "gradient_share is a constant of each mode now, .*leave it out"),
    (
        {"a_step_ratio": 1.5},
        TypeError,
        "a_step_ratio is a constant .*parameter groups with rates of their own",
    ),
    ({"rank_budget_tolerance": 0.0}, TypeError, "rank_budget_tolerance is 1 % always, .*leave it out"),
    ({"kfac_damp": 0.1}, TypeError, "no option 'kfac_damp'; did you mean 'kfac_damping'"),
    ({"xyzzy": 0.1}, TypeError, "no option 'xyzzy'; docs/options.md lists all options"),
    ({"enable_rank_adaptation": "yes"}, TypeError, "enable_rank_adaptation must be True or False, got 'yes'"),
    (
        {"enable_rank_adaptation": True},
        ValueError,
        "rank_adaptation_threshold has no effect with reprojection='none'",
    ),
    ({"preserve_norm": 1}, TypeError, "preserve_norm must be True or False, got 1"),
    ({"preserve_norm": False}, ValueError, "step_length='natural' .* precondition='spectral' does not apply"),
    (
        {"preserve_norm": False, "step_length": 0.5},
        ValueError,
        "preserve_norm=False contradicts step_length=0.5",
    ),
    (
        {"preserve_norm": True, "step_length": "natural"},
        ValueError,
        "preserve_norm=True contradicts step_length='nat",
    ),
    ({"rank_budget_start": "half"}, TypeError, "rank_budget_start must be a float in .*got 'half'"),
    ({"rank_budget_start": True, "rank_budget": 0.5, **WAY}, TypeError, "rank_budget_start must be a float"),
    (
        {"rank_budget_start": 0.9},
        ValueError,
        "rank_budget_start=0.9 is the first of the two .*rank_budget=None",
    ),
    (
        {"rank_budget_start": 0.9, "rank_budget": (0.8, 0.5)},
        ValueError,
        r"rank_budget=\(0.8, 0.5\); give both there",
    ),
    (
        {"rank_budget_start": 1.5, "rank_budget": 0.5, **WAY},
        ValueError,
        r"rank_budget_start must be in \(0, 1\]",
    ),
    ({"rank_regrowth": 1}, TypeError, "rank_regrowth must be True or False, got 1"),
    ({"rank_regrowth": True}, ValueError, "rank_regrowth=True contradicts rank_budget=None"),
    (
        {"rank_regrowth": True, "rank_budget": 0.5},
        ValueError,
        "rank_regrowth=True contradicts rank_budget=0.5",
    ),
    (
        {"rank_regrowth": True, "rank_budget": (0.9, 0.5)},
        ValueError,
        r"True contradicts rank_budget=\(0.9, 0.5\)",
    ),
    (
        {"rank_regrowth": False, "rank_budget": (0.3, 0.9)},
        ValueError,
        r"False contradicts rank_budget=\(0.3, 0.9\)",
    ),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), REFUSED, ids=[str(options) for options, *_ in REFUSED]
)
def test_what_is_refused_says_why_and_changes_nothing(options, error, message):
    model = tiny.llama(layers=1)
    base, given = tiny.adamw(model), copy.deepcopy(options)
    step = base.step
    with pytest.raises(error, match=message):
        GritOptimizer(base, model, **options)
    assert options == given
    assert base.step == step
    assert base.state == {}
    assert not any(module._forward_hooks for module in model.modules())


def test_translating_leaves_what_it_was_given_alone():
    options, former = (
        {"rank_budget": 0.5, "step_length": None},
        {"rank_budget_start": 0.9, "preserve_norm": False},
    )
    assert translated(options, former) == {"rank_budget": (0.9, 0.5), "step_length": "natural"}
    assert options == {"rank_budget": 0.5, "step_length": None}
    assert former == {"rank_budget_start": 0.9, "preserve_norm": False}


def test_for_trainer_keeps_former_names_from_the_base():
    model = tiny.llama(layers=1)
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    former = {"rank_budget_start": 0.9, "rank_budget": 0.5, **WAY}
    optimizer = for_trainer(model, **settings, **former)
    assert optimizer.options == built({**WAY, "rank_budget": (0.9, 0.5), "kfac_min_samples": 64})
    assert isinstance(optimizer.base, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)


@pytest.mark.parametrize("name", GONE)
def test_for_trainer_does_not_hand_a_constant_to_the_base(name):
    with pytest.raises(TypeError, match=name + " is "):
        for_trainer(tiny.llama(layers=1), lr=1e-3, **{name: 0.5})
