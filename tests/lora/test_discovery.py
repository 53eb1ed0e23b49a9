"""Which LoRA pairs are found in a model, and which are left to the base and why."""

import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny import adamw, llama, train, trained, weights
from torch import nn
from torch.optim import AdamW
from transformers import LlamaForCausalLM
from twin import warm

from grit_optim import GritOptimizer
from grit_optim.lora.discovery import find_sites


def found_in(model):
    sites, untapped = find_sites(model, trained(model))
    return [site.name for site in sites], untapped


# -------------------------------------------------------------------- found


def test_all_linear_gives_every_projection_its_own_name():
    names, untapped = found_in(llama())
    attention = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    mlp = [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    expected = [
        f"base_model.model.model.layers.{i}.{kind}.default" for i in (0, 1) for kind in attention + mlp
    ]
    assert sorted(names) == sorted(expected)
    assert untapped == {}


def test_a_site_knows_its_pair():
    model = llama(rank_pattern={"q_proj": 2}, lora_alpha=6)
    sites, _ = find_sites(model, trained(model))
    shapes = {s.name.split(".")[-2]: (s.rank, tuple(s.a.shape), tuple(s.b.shape), s.scaling) for s in sites}
    assert shapes["q_proj"] == (2, (2, 16), (16, 2), 3.0)
    assert shapes["down_proj"] == (4, (4, 24), (16, 4), 1.5)
    assert len(shapes) == 7


@pytest.mark.parametrize("prefix", ["module", "_orig_mod", "module._orig_mod", "_orig_mod.module"])
def test_wrappers_leave_no_trace_in_names(prefix):
    """So that a checkpoint of a compiled or parallel run loads into a plain one."""
    model = wrapped = llama()
    for name in reversed(prefix.split(".")):
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    assert found_in(wrapped) == found_in(model)
    assert len(found_in(wrapped)[0]) == 14


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compiled"]
)
def test_real_wrappers_leave_no_trace_in_names(wrap):
    model = llama()
    assert found_in(wrap(model)) == found_in(model)


def test_blocks_compiled_one_by_one_leave_no_trace_in_names():
    model = llama()
    names = found_in(model)
    layers = model.base_model.model.model.layers
    for i in range(len(layers)):
        layers[i] = torch.compile(layers[i], backend="eager")
    assert found_in(model) == names


def test_a_frozen_adapter_beside_the_active_one_is_not_tapped():
    model = llama()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    names, untapped = found_in(model)
    assert len(names) == 14
    assert {name.rsplit(".", 1)[1] for name in names} == {"default"}
    everything, untapped_of_all = find_sites(model, model.parameters())
    assert [site.name for site in everything] == names
    assert untapped == untapped_of_all == {}


# -------------------------------------------------------------------- left to the base, with a reason


def frozen_a():
    model = llama()
    for name, p in model.named_parameters():
        if "layers.0.mlp.up_proj.lora_A" in name:
            p.requires_grad_(False)
    return model, 13, "layers.0.mlp.up_proj.default", "only B is trained"


@pytest.mark.parametrize("make", [frozen_a])
@pytest.mark.parametrize(
    "given", [trained, lambda model: list(model.parameters())], ids=["trained", "all parameters"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_tapped_is_named_once_and_trained_by_the_base(make, given):
    """In a step from the same weights the gradients are the same, so it moves as the plain base moves it."""
    (model, tapped, name, reason), (plain, *_) = make(), make()
    for each in (model, plain):
        warm(each)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = GritOptimizer(AdamW(given(model), lr=1e-2), model, kfac_min_samples=8)
        before = weights(model)
        train(model, optimizer, 1)
    train(plain, adamw(plain), 1)
    told = [str(w.message) for w in caught if "GRIT" in str(w.message) or "taps" in str(w.message)]
    assert len(told) == 1
    assert "leaves 1 adapter(s) to the base optimizer alone" in told[0]
    assert name in told[0]
    assert reason in told[0]
    assert optimizer.telemetry()["sites"] == optimizer.telemetry()["engaged_sites"] == tapped
    ours, expected = weights(model), weights(plain)
    own = [n for n in ours if name.removesuffix(".default") in n]
    assert 1 <= len(own) <= 2
    assert all(torch.equal(ours[n], expected[n]) for n in own)
    assert sum(not torch.equal(ours[n], before[n]) for n in own) >= 1
    assert sum(not torch.equal(ours[n], expected[n]) for n in ours) == 2 * tapped


def adalora():
    config = llama().base_model.model.config
    return get_peft_model(
        LlamaForCausalLM(config), AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4)
    )


def test_adalora_is_refused_with_the_reason_where_only_taps_are_wanted():
    model = adalora()
    sites, unusable = found_in(model)
    assert (len(sites), unusable) == (2, {})
    with pytest.raises(ValueError, match=r"seen but not usable.*q_proj.*: AdaLoRA applies its own rank mask"):
        GritOptimizer(adamw(model), model, capture="taps")


@pytest.mark.parametrize(
    "part",
    [
        "found no LoRA pair in LlamaForCausalLM",
        "peft.get_peft_model(model, peft.LoraConfig(target_modules='all-linear'))",
        "sites=[Site.from_modules(name, a, b, scaling), ...]",
    ],
)
def test_a_model_without_lora_is_told_what_to_do(part):
    config = llama().base_model.model.config
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the message's parts are the parameters
        GritOptimizer(adamw(model), model)
    assert part in str(raised.value)


def test_a_base_without_the_pairs_is_refused():
    model, other = llama(), llama()
    with pytest.raises(ValueError, match="among the base optimizer's parameters"):
        GritOptimizer(adamw(other), model)
