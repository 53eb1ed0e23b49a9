"""Pairs that are handed over, and pairs of a model that changes under the optimizer."""

import warnings

import pytest
import torch
from peft import LoraConfig
from tiny import HandWritten, grit, llama, train, trained, weights
from torch import nn
from torch.optim import AdamW

from grit_optim import GritOptimizer, Site


def test_a_given_site_that_the_base_does_not_hold_is_refused():
    model = HandWritten()
    site = Site.from_modules("mine", model.down, model.up)
    base = AdamW([model.down.weight], lr=1e-2)
    with pytest.raises(
        ValueError, match=r"site\(s\) mine have weights that the base optimizer does not hold"
    ):
        GritOptimizer(base, model, sites=[site])


def test_sites_that_share_a_name_or_a_pair_are_refused():
    first, second = HandWritten(), HandWritten()
    model = nn.ModuleList([first, second])
    one, named_alike = (Site.from_modules("mine", m.down, m.up) for m in (first, second))
    same_pair, same_b = (
        Site.from_modules("again", first.down, first.up),
        Site.from_modules("b", second.down, first.up),
    )
    base = AdamW(model.parameters(), lr=1e-2)
    for other, what in ((named_alike, "the same name"), (same_pair, "the same A"), (same_b, "the same B")):
        with pytest.raises(ValueError, match=rf"sites 0 \('mine'\) and 1 \('{other.name}'\) have {what}"):
            GritOptimizer(base, model, sites=[one, other])


BAD_PAIRS = {
    "no weight": (nn.Tanh(), nn.Linear(3, 5), "site 'mine': `a` is a Tanh without a `weight` tensor"),
    "no weight in b": (
        nn.Linear(6, 3),
        nn.Identity(),
        "site 'mine': `b` is a Identity without a `weight` tensor",
    ),
    "ranks differ": (nn.Linear(6, 3), nn.Linear(4, 5), r"A has shape \[3, 6\] and B \[5, 4\]"),
    "swapped": (nn.Linear(3, 5), nn.Linear(6, 3), r"A has shape \[5, 3\] and B \[3, 6\]"),
    "one-dimensional": (nn.LayerNorm(3), nn.Linear(3, 5), r"A has shape \[3\]"),
    "empty": (nn.Linear(6, 0), nn.Linear(0, 5), "its weights are empty"),
    "grouped": (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1, groups=4), "B is a grouped convolution"),
}


@pytest.mark.parametrize(("a", "b", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_hand_written_pairs_are_checked(a, b, message):
    with pytest.raises(ValueError, match=message):
        Site.from_modules("mine", a, b)


# -------------------------------------------------------------------- a model that changes


def change_adapter(model, how):
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    if how == "update":
        layer.update_layer("default", 4, lora_alpha=4, config=model.peft_config["default"])
    else:
        layer.delete_adapter("default")
        if how == "re-added":
            layer.update_layer("default", 4, lora_alpha=4, config=model.peft_config["default"])
            layer.set_adapter("default")


def test_an_adapter_that_is_switched_to_is_tapped_and_the_other_kept():
    model = llama(layers=1)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    model.set_adapter("default")
    optimizer = GritOptimizer(AdamW(model.parameters(), lr=1e-2), model, kfac_min_samples=8)
    train(model, optimizer, 3)
    first = optimizer.telemetry()
    model.set_adapter("other")
    train(model, optimizer, 3, first=3)
    second = optimizer.telemetry()
    assert (first["sites"], second["sites"], second["engaged_sites"]) == (7, 14, 14)
    kept = {name: n for name, n in second["samples"].items() if name.endswith(".default")}
    assert kept == first["samples"]
    model.set_adapter("default")
    train(model, optimizer, 1, first=6)
    assert optimizer.telemetry()["sites"] == 14
    resumed = GritOptimizer(AdamW(model.parameters(), lr=1e-2), model, kfac_min_samples=8)
    assert resumed.telemetry()["sites"] == 7
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.telemetry()["samples"] == optimizer.telemetry()["samples"]


@pytest.mark.parametrize("how", ["unfrozen", "given another group while frozen"])
def test_pairs_that_are_frozen_for_a_while_are_not_lost(how):
    model = llama(layers=2)
    frozen = [p for name, p in model.named_parameters() if "lora_" in name and "layers.0" in name]
    optimizer = GritOptimizer(AdamW(trained(model), lr=1e-2), model, kfac_min_samples=8)
    if how == "unfrozen":
        for parameter in frozen:
            parameter.requires_grad_(False)
        optimizer = GritOptimizer(optimizer.base, model, kfac_min_samples=8)
        assert optimizer.telemetry()["sites"] == 7
    else:
        for parameter in trained(model):
            parameter.requires_grad_(False)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        frozen = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in frozen:
        parameter.requires_grad_(True)
    train(model, optimizer, 3)
    after = optimizer.telemetry()
    assert after["sites"] == after["engaged_sites"] == 14


@pytest.mark.parametrize("how", ["update", "re-added", "deleted"])
def test_a_replaced_adapter_is_named_once(how):
    model = llama()
    optimizer = grit(model)
    train(model, optimizer, 3)
    samples = optimizer.telemetry()["samples"]
    change_adapter(model, how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 3, first=3)
    told = [str(w.message) for w in caught if "LoRA site" in str(w.message)]
    assert len(told) == 1
    assert "1 LoRA site(s) (base_model.model.model.layers.0.self_attn.q_proj.default)" in told[0]
    after = optimizer.telemetry()
    assert after["sites"] == after["engaged_sites"] == 13
    # The step that notices puts new taps on; what the old ones had gathered is kept.
    assert max(after["samples"][name] - samples[name] for name in after["samples"]) == 132


def test_another_dtype_goes_on():
    """``model.to(dtype)`` changes what is in the parameters; AdamW itself does so before its first step."""
    model = llama()
    optimizer = grit(model)
    model.to(torch.bfloat16)
    train(model, optimizer, 2)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        train(model, optimizer, 2, first=2)
    after = weights(model)
    told = optimizer.telemetry()
    assert told["engaged_sites"] == 14
    assert told["dropped_folds"] == 0
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    moved = [float((after[n].float() - before[n].float()).norm()) for n in before]
    assert len(moved) == 28
    assert min(moved) > 0.01
    assert max(moved) < 1.0


@pytest.mark.parametrize(("given", "kind"), [(["q_proj"], "str"), ("q_proj", "str"), (3, "int")])
def test_sites_that_are_none_are_refused_by_type_and_place(given, kind):
    model = llama(layers=1)
    with pytest.raises(TypeError, match=rf"got {kind} at place 0. Make one with Site.from_modules"):
        GritOptimizer(AdamW(trained(model)), model, sites=given)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("given", [True, False])
def test_complex_pairs_are_refused_by_name(given):
    if given:
        model = HandWritten().to(torch.complex64)
        sites = [Site.from_modules("mine", model.down, model.up)]
    else:
        model, sites = llama(layers=1), None
        for name, module in model.named_modules():
            if name.endswith("q_proj.lora_A.default"):
                module.to(torch.complex64)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(TypeError, match=r"site '.*(mine|q_proj).*' has a complex A"):
        GritOptimizer(AdamW(trained(model)), model, sites=sites)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
