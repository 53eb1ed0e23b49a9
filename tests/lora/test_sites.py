"""Which LoRA pairs are found, which are left to the base and why, and how they are stacked."""

import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny import HandWritten, adamw, grit, llama, loss_of, train, trained, weights
from torch import nn
from torch.optim import AdamW
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from twin import warm

from grit_optim import GritOptimizer, Site
from grit_optim.lora.buckets import build_buckets
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


def embedding_lora():
    return llama(target_modules=["embed_tokens", "q_proj"]), 2, "embed_tokens", "looked up"


def experts():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=48,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    return get_peft_model(MixtralForCausalLM(config), lora), 1, "mlp.experts", "target_parameters"


def frozen_a():
    model = llama()
    for name, p in model.named_parameters():
        if "layers.0.mlp.up_proj.lora_A" in name:
            p.requires_grad_(False)
    return model, 13, "layers.0.mlp.up_proj.default", "only B is trained"


@pytest.mark.parametrize("make", [embedding_lora, experts, frozen_a])
@pytest.mark.parametrize(
    "given", [trained, lambda model: list(model.parameters())], ids=["trained", "all parameters"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_tapped_is_named_once_and_trained_by_the_base(make, given):
    """In one step from the same weights the gradients are the same, so it moves exactly as the plain base moves it."""
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


def test_adalora_is_refused_with_the_reason():
    model = adalora()
    _, untapped = found_in(model)
    assert len(untapped) == 2
    with pytest.raises(ValueError, match=r"seen but not usable.*q_proj: AdaLoRA applies its own rank mask"):
        GritOptimizer(adamw(model), model)


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


# -------------------------------------------------------------------- a model that changes under the
# optimizer


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
    # The step that notices puts new taps on, so its own statistics are not counted.
    assert max(after["samples"][name] - samples[name] for name in after["samples"]) == 88


def test_another_dtype_goes_on():
    """``model.to(dtype)`` keeps the parameters and changes what is in them; AdamW itself does so before its first step."""
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


# -------------------------------------------------------------------- buckets


def test_buckets_hold_sites_of_one_rank():
    model = llama(rank_pattern={"q_proj": 2, "down_proj": 7})
    sites, _ = find_sites(model, trained(model))
    buckets = build_buckets(sites, {id(p): 0 for p in trained(model)})
    assert {bucket.rank: len(bucket.sites) for bucket in buckets} == {2: 2, 4: 10, 7: 2}
    assert sorted(name for b in buckets for name in b.names()) == sorted(site.name for site in sites)
    for bucket in buckets:
        for side in "AB":
            groups = [g for g in bucket.groups if g.side == side]
            index = torch.cat([g.index for g in groups]).tolist()
            assert sorted(index) == list(range(len(bucket.sites)))
            for group in groups:
                of = [getattr(bucket.sites[i], side.lower()) for i in group.index.tolist()]
                assert all(p is q for p, q in zip(group.parameters, of, strict=True))
                assert len({(p.shape, p.dtype) for p in group.parameters}) == 1


def plus_groups(model):
    """LoRA+ style: A and B apart, each with its own rate and decay, and layer 1's A apart again."""

    def chosen(letter, layer):
        return [
            p for n, p in model.named_parameters() if p.requires_grad and f"lora_{letter}" in n and layer in n
        ]

    return [
        {"params": chosen("A", "layers.0."), "lr": 1e-2, "weight_decay": 0.1},
        {"params": chosen("A", "layers.1."), "lr": 3e-3, "weight_decay": 0.0},
        {"params": chosen("B", "layers."), "lr": 5e-2, "weight_decay": 0.5},
    ]


def test_groups_follow_the_parameter_groups():
    model = llama()
    optimizer = GritOptimizer(AdamW(plus_groups(model)), model)
    (bucket,) = [curvature.bucket for curvature in optimizer.curvature]
    assert sorted({(g.side, g.param_group) for g in bucket.groups}) == [("A", 0), ("A", 1), ("B", 2)]
    for group in bucket.groups:
        held = {id(p) for p in optimizer.param_groups[group.param_group]["params"]}
        assert {id(p) for p in group.parameters} <= held
    assert sum(len(g.parameters) for g in bucket.groups) == 28


@pytest.mark.parametrize("reloaded", [False, True], ids=["built", "reloaded"])
def test_steering_takes_each_groups_own_rate_and_decay(reloaded):
    """Decay stays outside, and what is left keeps the base's length: true only with that group's own lr·wd."""
    ours, plain = warm(llama()), warm(llama())
    base = AdamW(plus_groups(plain))
    optimizer = GritOptimizer(AdamW(plus_groups(ours)), ours, precondition="steer", kfac_min_samples=8)
    if reloaded:
        optimizer.load_state_dict(optimizer.state_dict())
    for settings in (*optimizer.param_groups, *base.param_groups):  # a schedule reaches the decay as well
        settings["lr"] *= 2
    decay = {id(p): 1 - g["lr"] * g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    before = [p.detach().clone() for p in trained(ours)]
    train(ours, optimizer, 1)
    train(plain, base, 1)
    turned = 0
    for w, p, q in zip(before, trained(ours), trained(plain), strict=True):
        steered, taken = p.detach() - decay[id(p)] * w, q.detach() - decay[id(p)] * w
        assert float(steered.norm()) == pytest.approx(float(taken.norm()), rel=1e-4)
        turned += float((steered * taken).sum() / taken.norm() ** 2) < 0.999
    assert turned == 28
    assert optimizer.telemetry()["engaged_sites"] == 14
    loss_of(ours).backward()
