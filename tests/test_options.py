"""Every option refuses what it cannot use, with a message that says what, why and what to do."""

import inspect
from dataclasses import fields

import pytest
import tiny
import torch

from grit_optim import GritOptimizer
from grit_optim.options import Options

INVALID = [
    # option, value, error, what the message says
    ("precondition", "eigenbais", ValueError, "did you mean 'eigenbasis'"),
    ("pairing", "both", ValueError, "'kfac', 'paper'"),
    ("fisher", "blockdiagonal", ValueError, "did you mean 'block_diagonal'"),
    ("damping", None, ValueError, "'relative', 'absolute'"),
    ("reprojection", "twosided", ValueError, "did you mean 'two_sided'"),
    ("fisher_decay", 1.0, ValueError, r"in \[0, 1\)"),
    ("fisher_decay", -0.1, ValueError, "running mean"),
    ("fisher_decay", "0.9", TypeError, "must be a number"),
    ("kfac_update_freq", 0, ValueError, "at least 1"),
    ("kfac_update_freq", 2.5, TypeError, "whole number"),
    ("kfac_update_freq", True, TypeError, "whole number"),
    ("kfac_min_samples", -1, ValueError, "at least 0"),
    ("kfac_damping", 0.0, ValueError, "above 0"),
    ("kfac_damping", float("nan"), ValueError, "above 0"),
    ("kfac_power", -0.5, ValueError, "from 0 up"),
    ("gradient_share", 1.5, ValueError, r"in \[0, 1\]"),
    ("direction_momentum", 1.0, ValueError, r"in \[0, 1\)"),
    ("direction_momentum", "adam", TypeError, "direction_momentum"),
    ("caution", -0.1, ValueError, r"in \[0, 1\]"),
    ("step_length", 0.0, ValueError, "'base' for the base's own length"),
    ("step_length", "bas", TypeError, "must be a number above 0, or 'base'"),
    ("a_step_ratio", float("inf"), ValueError, "above 0"),
    ("kfac_inversion_device", "gpu", ValueError, "is no device"),
    ("cov_update_freq", 0, ValueError, "at least 1"),
    ("max_tokens", 0, ValueError, "at least 1"),
    ("max_tokens", 1.5, TypeError, "or None"),
    ("ng_warmup_steps", -1, ValueError, "at least 0"),
    ("preserve_norm", 1, TypeError, "True or False"),
    ("max_grad_norm", 0, ValueError, "None for no limit"),
    ("reprojection_freq", 0, ValueError, "at least 1"),
    ("reprojection_k", 0, ValueError, "at least 1"),
    ("reprojection_warmup_steps", "soon", TypeError, "whole number"),
    ("enable_rank_adaptation", "yes", TypeError, "True or False"),
    ("enable_rank_adaptation", True, ValueError, "no effect with reprojection='none'"),
    ("rank_adaptation_threshold", 1.01, ValueError, r"in \(0, 1\]"),
    ("rank_adaptation_threshold", 0, ValueError, r"in \(0, 1\]"),
    ("min_lora_rank", -1, ValueError, "at least 0"),
    ("rank_adaptation_start_step", -5, ValueError, "at least 0"),
    ("rank_budget", 0.0, ValueError, r"in \(0, 1\] where it is a float"),
    ("rank_budget", 0, ValueError, "at least 1"),
    ("rank_budget", "half", TypeError, "a whole number of them"),
    ("rank_budget", True, TypeError, "a whole number of them"),
    ("rank_budget_start", 1.5, ValueError, r"in \(0, 1\] where it is a float"),
    ("rank_budget_schedule", "cosinus", ValueError, "did you mean 'cosine'"),
    ("rank_budget_steps", -1, ValueError, "at least 0"),
    ("rank_budget_tolerance", -0.1, ValueError, "from 0 up"),
    ("rank_regrowth", 1, TypeError, "True or False"),
    ("rank_regrowth", True, ValueError, "nothing adapts the rank"),
    ("lambda_kfac", -1e-5, ValueError, "from 0 up"),
    ("lambda_reproj", "1e-4", TypeError, "from 0 up"),
    ("lambda_reproj", 1e-4, ValueError, "set reprojection_k"),
    ("regularizer_warmup_steps", -1, ValueError, "at least 0"),
    ("adaptive_schedule", 1, TypeError, "True or False"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), INVALID, ids=[f"{n}={v!r}" for n, v, *_ in INVALID]
)
def test_invalid_option(name, value, error, message):
    model = tiny.llama()
    with pytest.raises(error, match=message) as caught:
        GritOptimizer(tiny.adamw(model), model, **{name: value})
    assert name in str(caught.value)
    assert not any("Tap" in str(h) for m in model.modules() for h in m._forward_hooks.values()), (
        "no hook is left behind"
    )


def test_every_option_has_an_invalid_value_in_the_table():
    assert {f.name for f in fields(Options)} == {name for name, *_ in INVALID}


def test_signature_and_validated_options_are_the_same_set():
    keywords = {
        n for n, p in inspect.signature(GritOptimizer.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    assert keywords - {"sites"} == {f.name for f in fields(Options)}


def test_every_option_is_documented():
    documentation = GritOptimizer.__doc__
    missing = [f.name for f in fields(Options) if f"\n        {f.name}: " not in documentation]
    assert missing == []


def test_balanced_has_no_paper_pairing():
    model = tiny.llama()
    with pytest.raises(ValueError, match="leave pairing at 'kfac'"):
        GritOptimizer(tiny.adamw(model), model, precondition="balanced", pairing="paper")


def test_misspelt_option_is_a_type_error():
    model = tiny.llama()
    with pytest.raises(TypeError, match="kfac_damp"):
        GritOptimizer(tiny.adamw(model), model, kfac_damp=0.1)


def test_bases_that_cannot_be_wrapped():
    model = tiny.llama()
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer.*got list"):
        GritOptimizer(tiny.trained(model), model)
    with pytest.raises(TypeError, match="LBFGS evaluates the loss several times"):
        GritOptimizer(torch.optim.LBFGS(tiny.trained(model)), model)
    with pytest.raises(TypeError, match="a GritOptimizer already"):
        GritOptimizer(tiny.grit(model), model)
    with pytest.raises(TypeError, match=r"the second argument must be the model.*got str"):
        GritOptimizer(tiny.adamw(model), "model")


@pytest.mark.parametrize(
    ("base", "length"),
    [
        ("AdamW", 0.6),
        ("RAdam", 0.6),
        ("Adamax", 0.6),
        ("SGD", "base"),
        ("Adafactor", "base"),
        ("Adagrad", "base"),
    ],
)
def test_the_default_length_of_a_step_depends_on_the_base(base, length):
    """Only an Adam's learning rate is a length per entry."""
    model = tiny.llama()
    optimizer = GritOptimizer(
        getattr(torch.optim, base)(tiny.trained(model), lr=1e-2), model, kfac_min_samples=8
    )
    assert optimizer.options.precondition == "spectral"
    assert optimizer.options.step_length == length
    tiny.train(model, optimizer, 3)
    assert optimizer.telemetry()["engaged_sites"] == 14
    assert optimizer.telemetry()["mean_cosine"] < 0.99


def test_defaults_of_the_mode_stand_in_for_none():
    model = tiny.llama()
    frequencies = {}
    for mode in ("spectral", "steer", "inverse", "eigenbasis", "balanced"):
        optimizer = GritOptimizer(tiny.adamw(model), model, precondition=mode)
        frequencies[mode] = (optimizer.options.kfac_update_freq, optimizer.options.kfac_damping)
        optimizer.close()
    assert frequencies == {
        "spectral": (1, 0.3),
        "steer": (1, 0.3),
        "inverse": (1, 0.03),
        "eigenbasis": (2, 0.03),
        "balanced": (10, 1e-4),
    }
