"""Shrinking in place: the model computes the same, what belongs to the pairs is smaller, training goes on."""

import copy
import dataclasses
import warnings

import bases
import pytest
import support
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from grit_optim import GritOptimizer, Site

MODES = ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"]


def reduced(mode="spectral", base=torch.optim.AdamW, model=None, **settings):
    model = tiny.llama(rank=6) if model is None else model
    settings = {"lr": 1e-2, **settings}
    optimizer = GritOptimizer(
        base(tiny.trained(model), **settings), model, precondition=mode, kfac_min_samples=8, min_lora_rank=0
    )
    tiny.train(model, optimizer, 5)
    optimizer.reduce_ranks_(0.4)
    assert 0 in optimizer.ranks().values()
    return model, optimizer


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.tokens(9)).logits


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_as_it_would_have_at_full_size(mode):
    """Zero rows take no part in anything, so cutting them off changes nothing but rounding."""
    model, optimizer = reduced(mode)
    twin_model, twin = copy.deepcopy([model, optimizer])
    before = logits(model)
    report = optimizer.shrink_()
    assert (logits(model) - before).abs().max() < 1e-6
    assert sum(p.numel() for p in tiny.trained(model)) == report.parameters < 0.41 * report.parameters_before
    losses, expected = tiny.train(model, optimizer, 4, first=5), tiny.train(twin_model, twin, 4, first=5)
    assert losses == pytest.approx(expected, abs=2e-5)
    assert (logits(model) - logits(twin_model)).abs().max() < 2e-4
    assert dict(optimizer.ranks()) == dict(twin.ranks())
    assert optimizer.ranks().predicted_loss == pytest.approx(twin.ranks().predicted_loss)


BASES = {
    "adamw": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "lr": 1e-3}),
    "adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("base", BASES)
def test_the_bases_state_of_what_remains_is_kept(base):
    kind, settings = BASES[base]
    model, optimizer = reduced(base=kind, **settings)
    ranks = optimizer.ranks()
    before = {
        site.name: [
            {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
            for p in (site.a, site.b)
        ]
        for site in support.sites(optimizer)
    }
    optimizer.shrink_()
    left = {site.name: site for site in support.sites(optimizer)}
    assert set(left) == {name for name, rank in ranks.items() if rank > 0}
    compared = 0
    for name, site in left.items():
        for dim, (parameter, old) in enumerate(zip((site.a, site.b), before[name], strict=True)):
            new = optimizer.state[parameter]
            assert new.keys() >= old.keys()
            for key, value in old.items():
                expected = value.narrow(dim, 0, ranks[name]) if value.dim() else value
                assert torch.equal(new[key], expected), key
                compared += 1
    assert compared >= 2 * len(left)
    assert len(optimizer.state) == len(tiny.trained(model)) == 2 * len(left)


def test_the_parameter_objects_stay_and_those_of_rank_zero_leave():
    model, optimizer = reduced()
    before = {id(p) for p in tiny.trained(model)}
    optimizer.shrink_()
    after = tiny.trained(model)
    assert {id(p) for p in after} < before
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in after}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            assert module.weight.shape == (module.out_features, module.in_features)


def test_a_graph_that_is_still_alive_does_not_remember_the_old_shape():
    """``loss`` of the last step usually is, in a training loop."""
    model, optimizer = reduced()
    loss = tiny.loss_of(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.shrink_()
    again = tiny.loss_of(model)
    again.backward()
    assert all(p.grad.shape == p.shape for p in tiny.trained(model))
    optimizer.step()
    assert torch.isfinite(loss)


def test_gradients_that_are_there_are_cut_too():
    model, optimizer = reduced()
    tiny.loss_of(model).backward()
    site = support.sites(optimizer)[2]
    gradient, rank = site.a.grad.clone(), optimizer.ranks()[site.name]
    assert rank > 0
    optimizer.shrink_()
    assert torch.equal(site.a.grad, gradient[:rank])


def test_what_peft_saves_and_what_save_adapter_saves_load_to_the_same(tmp_path):
    model, optimizer = reduced()
    optimizer.shrink_()
    tiny.train(model, optimizer, 2, first=5)
    model.save_pretrained(tmp_path / "peft")
    report = optimizer.save_adapter(tmp_path / "ours")
    assert report.parameters_before == optimizer.ranks().parameters_before
    assert 0 in report.values(), "the report still knows the layers that were taken out"
    assert report.predicted_loss == pytest.approx(optimizer.ranks().predicted_loss)
    for name in ("peft", "ours"):
        fresh = PeftModel.from_pretrained(tiny.llama(rank=1).unload(), tmp_path / name)
        assert (logits(fresh.eval()) - logits(model.eval())).abs().max() < 1e-6


def test_a_run_resumes_from_the_smaller_adapter(tmp_path):
    """Export, load as trainable, and load the optimizer's state: both copies go on alike."""
    model, optimizer = reduced()
    optimizer.shrink_()
    tiny.train(model, optimizer, 2, first=5)
    optimizer.save_adapter(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    fresh = PeftModel.from_pretrained(tiny.llama(rank=1).unload(), tmp_path / "adapter", is_trainable=True)
    resumed = tiny.grit(fresh, min_lora_rank=0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert resumed.ranks().as_dict() == optimizer.ranks().as_dict()
    for m, o in ((model, optimizer), (fresh, resumed)):
        tiny.train(m, o, 3, first=7)
    assert len(tiny.weights(model)) == len(tiny.weights(fresh)) > 10
    for name, value in tiny.weights(model).items():
        torch.testing.assert_close(value, tiny.weights(fresh)[name], rtol=1e-4, atol=1e-6)


def test_shrinking_twice_and_a_budget_that_goes_on():
    model = tiny.llama(rank=6)
    optimizer = tiny.grit(
        model,
        reprojection="balanced",
        reprojection_freq=2,
        rank_budget=0.2,
        rank_budget_steps=12,
        min_lora_rank=0,
    )
    sizes = []
    for phase in range(3):
        tiny.train(model, optimizer, 6, first=6 * phase)
        optimizer.shrink_()
        sizes.append(sum(p.numel() for p in tiny.trained(model)))
    assert sizes[0] > sizes[1] >= sizes[2]
    total = optimizer.ranks().parameters_before
    assert total == 2976, "a share stays a share of what the adapter was at first"
    assert 0.17 * total < sizes[2] <= 0.2 * total


def test_nothing_given_up_changes_nothing():
    model = tiny.llama()
    optimizer = tiny.grit(model)
    tiny.train(model, optimizer, 3)
    before = tiny.weights(model)
    optimizer.shrink_()
    assert all(torch.equal(v, before[n]) for n, v in tiny.weights(model).items())


def test_of_two_adapters_only_the_trained_one_shrinks():
    model = tiny.llama()
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    others = {n: p.shape for n, p in model.named_parameters() if ".other." in n}
    optimizer = tiny.grit(model, min_lora_rank=0)
    tiny.train(model, optimizer, 4)
    optimizer.reduce_ranks_(0.4)
    before = logits(model)
    optimizer.shrink_()
    assert {n: p.shape for n, p in model.named_parameters() if ".other." in n} == others
    assert model.active_adapter == "default"
    assert (logits(model) - before).abs().max() < 1e-6


def test_convolutions_shrink():
    torch.manual_seed(0)
    model = get_peft_model(bases.Nested(), LoraConfig(r=4, lora_alpha=6, target_modules=["proj", "conv"]))
    optimizer = tiny.grit(model, kfac_min_samples=1)
    for _ in range(3):
        model(bases.inputs("nested")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.reduce_ranks_(dict.fromkeys(optimizer.ranks(), 2))
    before = bases.answer("nested", model)
    optimizer.shrink_()
    assert (bases.answer("nested", model) - before).abs().max() < 1e-6
    conv = model.base_model.model.conv
    assert conv.lora_A["default"].weight.shape[0] == conv.lora_A["default"].out_channels == 2


def test_hand_written_lora_shrinks():
    torch.manual_seed(0)
    model = tiny.HandWritten(d_in=6, d_out=5, rank=3)
    sites = [Site.from_modules("layer", model.down, model.up, model.scaling)]
    optimizer = GritOptimizer(tiny.adamw(model), model, sites=sites, kfac_min_samples=4)
    x = torch.randn(16, 6)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.reduce_ranks_({"layer": 1})
    before = model(x)
    optimizer.shrink_()
    torch.testing.assert_close(model(x), before)
    assert model.down.weight.shape == (1, 6)
    assert model.up.weight.shape == (5, 1)


def test_a_copy_is_told_its_model_and_holds_no_frozen_weights():
    model, optimizer = reduced()
    twin_model, twin = copy.deepcopy([model, optimizer])
    held = [m for site in support.sites(copy.deepcopy(optimizer)) for m in (site.a_modules, site.b_modules)]
    assert len(held) == 28
    assert all(p.requires_grad for m in held for p in m.parameters())
    fields = {f.name for f in dataclasses.fields(Site)}
    assert fields == {
        *("name", "adapter", "a_modules", "b_modules", "scalings", "layer_bias"),
        *("untapped", "experts", "expert", "modality"),
    }
    assert all(site.layer_bias is None for site in support.sites(optimizer)), (
        "only a bias that is trained is held"
    )
    with pytest.raises(ValueError, match="pass model="):
        twin.shrink_()
    before = logits(twin_model)
    twin.shrink_(model=twin_model)
    assert (logits(twin_model) - before).abs().max() < 1e-6
    assert sum(p.numel() for p in tiny.trained(model)) > sum(p.numel() for p in tiny.trained(twin_model))


def test_a_bias_of_b_stays_when_all_directions_go():
    model = tiny.llama(lora_bias=True)
    optimizer = tiny.grit(model, min_lora_rank=0)
    tiny.train(model, optimizer, 4)
    optimizer.reduce_ranks_({name: 0 for name in optimizer.ranks() if "q_proj" in name})
    before = logits(model)
    report = optimizer.shrink_()
    assert (logits(model) - before).abs().max() < 1e-6
    assert sorted(report.values())[:3] == [0, 0, 4]
    losses = tiny.train(model, optimizer, 2, first=4)
    assert all(loss < 10 for loss in losses)
    assert dict(optimizer.ranks()) == dict(report)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_depends_on_the_rank_is_not_shrunk(start):
    """PEFT would take another term out of the base model's weights when it loads the smaller adapter."""
    model = tiny.llama(layers=1, init_lora_weights=start)
    optimizer = tiny.grit(model, min_lora_rank=0)
    tiny.train(model, optimizer, 2)
    optimizer.reduce_ranks_(0.5)
    shapes = [p.shape for p in tiny.trained(model)]
    with pytest.raises(ValueError, match=f"was started with init_lora_weights='{start}'"):
        optimizer.shrink_()
    assert [p.shape for p in tiny.trained(model)] == shapes


@pytest.mark.parametrize(
    ("lora", "why"), [({"use_dora": True}, "uses DoRA"), ({"init_lora_weights": "pissa"}, "pissa")]
)
def test_ranks_that_could_not_be_saved_smaller_are_said_before_the_run(lora, why):
    model = tiny.llama(layers=1, **lora)
    with pytest.warns(UserWarning, match=rf"save_adapter\(\) and shrink_\(\) will refuse: .*{why}"):
        tiny.grit(model, reprojection="balanced", rank_budget=0.5, min_lora_rank=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.grit(model)


def test_nothing_left_is_refused():
    model = tiny.llama()
    optimizer = tiny.grit(model)
    tiny.train(model, optimizer, 3)
    optimizer.reduce_ranks_(dict.fromkeys(optimizer.ranks(), 0))
    with pytest.raises(ValueError, match="no site keeps a direction"):
        optimizer.shrink_()


def test_state_that_cannot_be_cut_is_reset_and_named():
    model, optimizer = reduced(mode="none", base=torch.optim.Adafactor)
    tiny.train(model, optimizer, 1)  # Adafactor has state again
    with pytest.warns(UserWarning, match="does not know how to cut the state that Adafactor keeps"):
        optimizer.shrink_()
    tiny.train(model, optimizer, 2)
