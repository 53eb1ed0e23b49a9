"""Every option refuses what it cannot use, with a message that says what, why and what to do."""

import inspect

import pytest
import tiny
import torch

from grit_optim import GritOptimizer
from grit_optim.options import DECLARED, Options
from grit_optim.preconditioners.inverse import Inverse

INVALID = [
    # option, value, error, what the message says
    ("precondition", "eigenbais", ValueError, "did you mean 'eigenbasis'"),
    ("direction_momentum", "bse", TypeError, "did you mean 'base'"),
    ("step_length", "naturl", TypeError, "did you mean 'natural'"),
    ("pairing", "both", ValueError, "'kfac', 'paper'"),
    ("fisher", "blockdiagonal", ValueError, "did you mean 'block_diagonal'"),
    ("damping", None, ValueError, "'relative', 'absolute'"),
    ("reprojection", "twosided", ValueError, "did you mean 'two_sided'"),
    ("fisher_decay", 1.0, ValueError, r"in \[0, 1\)"),
    ("fisher_decay", -0.1, ValueError, "running mean"),
    ("fisher_decay", "0.9", TypeError, "must be a number"),
    ("modality_weights", "eqaul", TypeError, "did you mean 'equal'"),
    ("modality_weights", {"visual": 1}, ValueError, "is not one of 'text', 'vision'"),
    ("modality_weights", {"text": -1}, ValueError, "the share of 'text' in modality_weights"),
    ("modality_weights", {"text": 0}, ValueError, "leaves no token anything"),
    ("modality_weights", "equal", ValueError, "found no vision part in PeftModel"),
    ("kfac_update_freq", 0, ValueError, "at least 1"),
    ("kfac_update_freq", 2.5, TypeError, "whole number"),
    ("kfac_update_freq", True, TypeError, "whole number"),
    ("kfac_min_samples", -1, ValueError, "at least 0"),
    ("kfac_damping", 0.0, ValueError, "above 0"),
    ("kfac_damping", float("nan"), ValueError, "above 0"),
    ("kfac_power", -0.5, ValueError, "from 0 up"),
    ("direction_momentum", 1.0, ValueError, r"in \[0, 1\)"),
    ("direction_momentum", "adam", TypeError, "direction_momentum"),
    ("step_length", 0.0, ValueError, "'base' for the base's own length"),
    (
        "step_length",
        "bas",
        TypeError,
        "must be a number above 0, 'base' for the base's own length, or 'natural'",
    ),
    ("step_length", "natural", ValueError, "precondition='spectral' does not apply"),
    ("kfac_inversion_device", "gpu", ValueError, "is no device"),
    ("capture", "hooks", ValueError, "is not one of 'auto', 'taps', 'gradients'"),
    ("cov_update_freq", 0, ValueError, "at least 1"),
    ("max_tokens", 0, ValueError, "at least 1"),
    ("max_tokens", 1.5, TypeError, "or None"),
    ("ng_warmup_steps", -1, ValueError, "at least 0"),
    ("max_grad_norm", 0, ValueError, "None for no limit"),
    ("reprojection_freq", 0, ValueError, "at least 1"),
    ("reprojection_k", 0, ValueError, "at least 1"),
    ("reprojection_warmup_steps", "soon", TypeError, "whole number"),
    ("rank_adaptation_threshold", 1.01, ValueError, r"in \(0, 1\]"),
    ("rank_adaptation_threshold", 0, ValueError, r"in \(0, 1\]"),
    ("rank_adaptation_threshold", True, TypeError, "must be a number"),
    ("rank_adaptation_threshold", 0.99, ValueError, "no effect with reprojection='none'"),
    ("min_lora_rank", -1, ValueError, "at least 0"),
    ("rank_adaptation_start_step", -5, ValueError, "at least 0"),
    ("rank_budget", 0.0, ValueError, r"in \(0, 1\] where it is a float"),
    ("rank_budget", 0, ValueError, "at least 1"),
    ("rank_budget", "half", TypeError, "a whole number of them"),
    ("rank_budget", True, TypeError, "a whole number of them"),
    ("rank_budget", (1.5, 0.5), ValueError, r"the start of rank_budget must be in \(0, 1\]"),
    ("rank_budget", (0.5, 0), ValueError, "the end of rank_budget must be at least 1"),
    ("rank_budget", (0.9, 0.7, 0.5), TypeError, "a whole number of them"),
    ("rank_budget", {}, ValueError, "an empty mapping"),
    ("rank_budget", {"visoin": 0.5}, ValueError, "did you mean 'vision'"),
    ("rank_budget", {"vision": 1.5}, ValueError, r"rank_budget\['vision'\] must be in"),
    ("rank_budget", "efective", TypeError, "did you mean 'effective'"),
    ("effective_rank_factor", 0, ValueError, "above 0"),
    ("rank_budget_schedule", "cosinus", ValueError, "did you mean 'cosine'"),
    ("rank_budget_steps", -1, ValueError, "at least 0"),
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
    assert {*DECLARED} == {name for name, *_ in INVALID}


def test_the_signature_agrees_with_what_is_declared():
    """Names, their order, defaults and types; one option more than 33 has to take the place of another."""
    parameters = inspect.signature(GritOptimizer.__init__).parameters.values()
    others = ("sites", "modality_of", "process_group")
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in others]
    told = {p.name: (p.default, p.annotation) for p in keywords}
    assert told == {name: (known.default, known.type) for name, known in DECLARED.items()}
    assert len(told) <= 33


def test_every_option_is_documented():
    assert all(len(known.metadata["meaning"]) > 20 for known in DECLARED.values())
    documentation = GritOptimizer.__doc__.split("\nArgs:\n")[1].split("\nRaises:\n")[0]
    described = [line.split(":")[0].strip() for line in documentation.splitlines() if line[4:5].strip()]
    assert described == ["base", "model", "sites", "modality_of", "process_group", *DECLARED]
    words = " ".join(documentation.split())
    assert all(f"{name}: {known.metadata['meaning']}" in words for name, known in DECLARED.items())


def test_flat_keywords_become_groups_and_come_back():
    given = {"precondition": "inverse", "fisher_decay": None, "max_tokens": 5, "reprojection_freq": 7}
    given |= {
        "reprojection": "balanced",
        "rank_budget": (0.9, 0.5),
        "rank_budget_steps": 3,
        "lambda_kfac": 0.5,
    }
    given |= Inverse.defaults
    options = Options.of(given)
    groups = (
        options.preconditioning,
        options.curvature,
        options.recording,
        options.schedule,
        options.ranks,
        options.penalties,
    )
    subjects = ("Precondition", "Curvature", "Capture", "Schedule", "Rank", "Penalty")
    assert [type(group).__name__ for group in groups] == [f"{subject}Options" for subject in subjects]
    flat = {name: given.get(name, known.default) for name, known in DECLARED.items()}
    assert options.as_dict() == flat == {name: getattr(options, name) for name in DECLARED}


def test_balanced_has_no_paper_pairing():
    model = tiny.llama()
    with pytest.raises(ValueError, match="leave pairing at 'kfac'"):
        GritOptimizer(tiny.adamw(model), model, precondition="balanced", pairing="paper")


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
    assert optimizer.options.preconditioning.precondition == "spectral"
    assert optimizer.options.preconditioning.step_length == length
    tiny.train(model, optimizer, 3)
    assert optimizer.telemetry()["engaged_sites"] == 14
    assert optimizer.telemetry()["mean_cosine"] < 0.99


def test_defaults_of_the_mode_stand_in_for_none():
    model = tiny.llama()
    frequencies = {}
    for mode in ("spectral", "steer", "inverse", "eigenbasis", "balanced"):
        optimizer = GritOptimizer(tiny.adamw(model), model, precondition=mode)
        options = optimizer.options
        frequencies[mode] = (options.schedule.kfac_update_freq, options.curvature.kfac_damping)
        optimizer.close()
    assert frequencies == {
        "spectral": (1, 0.3),
        "steer": (1, 0.3),
        "inverse": (1, 0.03),
        "eigenbasis": (2, 0.03),
        "balanced": (10, 1e-4),
    }
