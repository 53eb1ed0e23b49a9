"""An option that changes nothing is told, and one that changes something is not: tried, not believed."""

import warnings

import pytest
import tiny
import torch

from grit_optim import GritOptimizer, Site, presets
from grit_optim.options import DECLARED
from grit_optim.options.effect import OF_THE_MODE
from grit_optim.preconditioners.modes import MODES

STEPS = 6
# The options that are up to the mode, with a value that shows: on the meta device a decomposition fails.
VALUES = {
    "kfac_power": 0.25,
    "direction_momentum": 0.3,
    "step_length": 0.2,
    "fisher": "block_diagonal",
    "pairing": "paper",
    "kfac_damping": 0.7,
    "kfac_inversion_device": "meta",
    "kfac_update_freq": 3,
    "ng_warmup_steps": 4,
}
REPROJECTS = {"reprojection": "two_sided", "reprojection_freq": 4, "reprojection_k": 2}
BUDGET = {"reprojection": "balanced", "rank_budget": 0.7, "reprojection_freq": 4, "min_lora_rank": 0}
PENALTY = {"lambda_kfac": 0.5}
# option, value, others with which it has an effect, others with which it has none
NEEDS = [
    ("reprojection_freq", 9, REPROJECTS, {}),
    ("reprojection_warmup_steps", 5, REPROJECTS, {}),
    ("reprojection_k", 1, REPROJECTS, {}),
    ("reprojection_k", 1, {"lambda_reproj": 0.1}, {}),
    ("reprojection_k", 1, {**BUDGET, "rank_adaptation_start_step": 9}, BUDGET),
    ("min_lora_rank", 2, {}, REPROJECTS),
    ("min_lora_rank", 2, BUDGET, REPROJECTS),
    ("rank_adaptation_start_step", 25, BUDGET, REPROJECTS),
    ("regularizer_warmup_steps", 20, PENALTY, {}),
    ("kfac_inversion_device", "cpu", {"fisher": "ekfac"}, {"fisher": "diagonal"}),
    ("kfac_update_freq", 3, {**PENALTY, "precondition": "none"}, {"precondition": "none"}),
    ("adaptive_schedule", True, {}, {"precondition": "none"}),
    ("adaptive_schedule", True, {**PENALTY, "precondition": "none"}, {"precondition": "none"}),
    ("adaptive_schedule", True, {**REPROJECTS, "precondition": "none"}, {"precondition": "none"}),
]


def built(options):
    """A model, its optimizer, and what was told."""
    torch.manual_seed(0)
    model = tiny.HandWritten(d_in=5, d_out=4, rank=3)
    sites = [Site.from_modules("layer", model.down, model.up, model.scaling)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = GritOptimizer(tiny.adamw(model), model, sites=sites, kfac_min_samples=4, **options)
    return model, optimizer, " ".join(str(w.message) for w in caught if "no effect" in str(w.message))


def trained(options):
    """The weights after some steps, and what was told; None for options that are refused."""
    try:
        model, optimizer, told = built(options)
    except ValueError:
        return None, ""
    for x in torch.randn(STEPS, 12, 5) * torch.linspace(2, 0.3, 5):
        optimizer.zero_grad()
        (model(x) - x[:, :4].sin()).square().sum().backward()
        try:
            optimizer.step()
        except NotImplementedError:  # a tensor on the meta device has no values
            return "failed", told
    return torch.cat([p.detach().flatten() for p in tiny.trained(model)]), told


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_does_not_use_is_told_and_nothing_else(mode):
    before, told = trained({"precondition": mode})
    assert told == ""
    refused = []
    for name, value in VALUES.items():
        value = "natural" if (mode, name) == ("inverse", "step_length") else value
        after, told = trained({"precondition": mode, name: value})
        if after is None:
            refused.append(name)
            continue
        same = isinstance(after, torch.Tensor) and torch.equal(before, after)
        assert (f"{name}={value!r}" in told) == same, (name, told)
    assert refused == (["fisher", "pairing"] if mode == "balanced" else [])
    assert set(VALUES) == OF_THE_MODE


@pytest.mark.parametrize(
    ("name", "value", "used", "unused"), NEEDS, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(NEEDS)]
)
def test_what_lacks_another_option_is_told(name, value, used, unused):
    assert f"{name}={value!r}: " in built({**unused, name: value})[2]
    assert f"{name}={value!r}: " not in built({**used, name: value})[2]


def test_the_message_says_what_and_why_and_what_to_do():
    model = tiny.llama(layers=1)
    with pytest.warns(UserWarning, match="no effect") as caught:
        tiny.grit(model, precondition="inverse", kfac_power=0.7, reprojection_k=2)
    assert [str(w.message) for w in caught] == [
        "2 option(s) have no effect here: kfac_power=0.7: precondition='inverse' does not use it; it is for "
        "'spectral', 'steer'; reprojection_k=2: no rank is fixed: reprojection is "
        "'none', or rank_budget decides from the start. Leave them out, or set what they need"
    ]


def test_presets_and_defaults_are_never_told():
    cases = [presets.PAPER, presets.PAPER_LONG_RUN]
    cases += [{"precondition": name, **mode.defaults_around(tiny.adamw(tiny.HandWritten()))}
              for name, mode in MODES.items()]  # fmt: skip
    cases += [{"precondition": name, **{n: k.default for n, k in DECLARED.items() if n != "precondition"}}
              for name in MODES]  # fmt: skip
    for options in cases:
        model = tiny.HandWritten()
        sites = [Site.from_modules("layer", model.down, model.up, model.scaling)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GritOptimizer(tiny.adamw(model), model, sites=sites, **options).close()


def test_every_option_of_the_modes_is_used_by_one_and_no_mode_names_another():
    assert frozenset().union(*(mode.uses for mode in MODES.values())) == OF_THE_MODE
    assert set(DECLARED) >= OF_THE_MODE
