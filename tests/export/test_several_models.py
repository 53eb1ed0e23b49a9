"""Several PeftModels under one optimizer: all of them are saved and shrunk, or nothing is touched."""

import copy
import gc
import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from twin import assert_equal

from grit_optim import GritOptimizer, export_adapter

TARGETS = ["q_proj", "down_proj"]


def two(**second):
    return tiny.llama(layers=1, target_modules=TARGETS), tiny.llama(
        layers=1, seed=1, **{"target_modules": TARGETS, **second}
    )


def train(models, optimizer, steps=4, first=0):
    for seed in range(first, first + steps):
        sum(tiny.loss_of(model, seed) for model in models).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_together(models, container=None, **options):
    both = nn.ModuleList(models) if container is None else container
    optimizer = tiny.grit(both, min_lora_rank=0, **options)
    train(models, optimizer)
    return optimizer


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.tokens(9)).logits


def test_each_is_saved_in_a_folder_that_peft_loads(tmp_path):
    models = two()
    optimizer = trained_together(models)
    report = optimizer.save_adapter(tmp_path)
    assert dict(report) == dict(optimizer.ranks())
    assert len(report) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    for number, model in enumerate(models):
        path = tmp_path / str(number)
        fresh = LlamaForCausalLM(model.base_model.model.config)
        plain = {
            name.replace(".base_layer", ""): value
            for name, value in model.base_model.model.state_dict().items()
            if "lora_" not in name
        }
        fresh.load_state_dict(plain)
        assert (logits(PeftModel.from_pretrained(fresh, path)) - logits(model)).abs().max() < 1e-6
        saved = json.loads((path / "grit_ranks.json").read_text())
        assert [site["name"] for site in saved["sites"]] == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.mlp.down_proj",
        ]
    with pytest.raises(ValueError, match="holds 2 PeftModels"):
        export_adapter(nn.ModuleList(models), tmp_path / "x")


@pytest.mark.parametrize("broken", ["NaN", "DoRA", "no PeftModel"])
def test_where_one_cannot_be_saved_none_is(tmp_path, broken):
    models = two(use_dora=broken == "DoRA")
    container = nn.ModuleList(models)
    if broken == "no PeftModel":
        container = nn.ModuleList([models[0], models[1].base_model])
    optimizer = trained_together(models, container)
    if broken == "NaN":
        tiny.trained(models[1])[0].data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaN|DoRA|lie in none of the 1 PeftModel"):
        optimizer.save_adapter(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    if broken == "NaN":
        return
    before = [tiny.weights(model) for model in models]
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"DoRA|lie in none of the 1 PeftModel"):
        optimizer.shrink_()
    for model, weights in zip(models, before, strict=True):
        assert_equal(tiny.weights(model), weights)
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("mode", ["spectral", "eigenbasis"])
def test_all_of_them_shrink_and_training_goes_on(tmp_path, mode):
    models = two()
    optimizer = trained_together(models, precondition=mode)
    names = list(optimizer.ranks())
    optimizer.reduce_ranks_({names[0]: 0, names[1]: 2, names[2]: 3, names[3]: 1})
    before = [logits(model) for model in models]
    optimizer.shrink_()
    for model, expected in zip(models, before, strict=True):
        assert (logits(model) - expected).abs().max() < 1e-6
    assert [p.shape[0] for m in models for n, p in m.named_parameters() if "lora_A" in n] == [2, 3, 1]
    assert [m.peft_config["default"].r for m in models] == [2, 3]
    train(models, optimizer, 2, first=4)
    report = optimizer.save_adapter(tmp_path)
    assert dict(report) == dict(optimizer.ranks()) == dict(zip(names, (0, 2, 3, 1), strict=True))


def test_adapters_of_different_names():
    models = two()
    models[1].add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    models[1].set_adapter("other")
    optimizer = trained_together(models)
    assert sorted(optimizer.ranks().values()) == [2, 2, 4, 4]


def test_the_container_may_be_made_for_this_alone():
    models = two()
    late = tiny.trained(models[1])
    for p in late:
        p.requires_grad_(False)
    optimizer = GritOptimizer(
        torch.optim.AdamW([*tiny.trained(models[0]), *late], lr=1e-2),
        nn.ModuleList(models),
        kfac_min_samples=8,
    )
    gc.collect()
    for p in late:
        p.requires_grad_()
    train(models, optimizer)
    assert optimizer.telemetry()["engaged_sites"] == 4


@pytest.mark.parametrize("named", [False, True])
def test_pairs_of_a_model_that_is_not_given_are_named(named):
    one, other = two()
    head = nn.Linear(4, 2)  # no pair
    params = [(n, p) for m in (one, other) for n, p in m.named_parameters() if p.requires_grad]
    params = [(f"{i}.{n}", p) for i, (n, p) in enumerate(params)] + list(head.named_parameters())
    base = torch.optim.AdamW(params if named else [p for _, p in params], lr=1e-2)
    name = r"4\.base_model" if named else r"param_groups\[0\]\['params'\]\[4\] \[4, 16\]"
    with pytest.warns(UserWarning, match=rf"holds 4 parameter\(s\) that look like .* PeftModel's: {name}"):
        GritOptimizer(base, one)


def test_a_peft_model_inside_a_module_keeps_its_folder(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = tiny.grit(nn.ModuleDict({"tower": model}))
    for seed in range(3):
        model(torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.save_adapter(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


# -------------------------------------------------------------------- lists that go with a group's parameters


def test_lists_of_a_group_follow_its_parameters():
    model = tiny.llama(layers=1, rank=3)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    pair, rest = named[:2], named[2:]
    base = torch.optim.AdamW(
        [
            {"params": rest, "weights": list(range(len(rest))), "note": "kept", "sizes": [1]},
            {"params": pair, "betas": [0.9, 0.99], "tags": tuple("ab")},
        ],
        lr=1e-2,
    )
    optimizer = GritOptimizer(base, model, kfac_min_samples=8, min_lora_rank=0)
    tiny.train(model, optimizer, 4)
    ranks = dict.fromkeys(optimizer.ranks(), 2)
    names = list(ranks)
    optimizer.reduce_ranks_({**ranks, names[0]: 0, names[2]: 0, names[5]: 0})
    optimizer.shrink_()
    first, second = optimizer.param_groups
    now = {id(p): n for n, p in model.named_parameters()}
    assert len(first["params"]) == 8
    assert first["param_names"] == [now[id(p)] for p in first["params"]]
    assert [rest[i][0] for i in first["weights"]] == first["param_names"]
    assert (first["note"], first["sizes"]) == ("kept", [1])
    assert (second["params"], second["param_names"], second["tags"]) == ([], [], ())
    assert list(second["betas"]) == [0.9, 0.99]
    tiny.train(model, optimizer, 1, first=4)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == first["param_names"]
