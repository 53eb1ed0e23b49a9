"""Exported adapters: what they compute in a fresh process, how large they are, and what is refused."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import bases
import pytest
import support
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from grit_optim import GritOptimizer, Site, export_adapter
from grit_optim.export import adapter as export
from grit_optim.export import atomic_folder

LLAMA = {"r": 6, "lora_alpha": 6, "target_modules": "all-linear"}
NESTED = {"r": 4, "lora_alpha": 6, "target_modules": ["proj", "conv"]}

# name: base, LoraConfig, arguments of save_adapter, ranks by the end of a layer's name (else 3 of 6, or 2 of
# 4)
CASES = {
    "mixed ranks and left-out sites": ("fp32", LLAMA, {}, {"q_proj": 0, "v_proj": 5, "1.mlp.up_proj": 1}),
    "one rank for all": ("fp32", LLAMA, {}, {}),
    "alpha is not the rank": ("fp32", {**LLAMA, "lora_alpha": 11}, {}, {"k_proj": 0, "o_proj": 2}),
    "rsLoRA": ("fp32", {**LLAMA, "lora_alpha": 5, "use_rslora": True}, {}, {"q_proj": 1, "down_proj": 0}),
    "folded": ("fp32", {**LLAMA, "lora_alpha": 11}, {"fold_scale": True}, {"q_proj": 1, "up_proj": 0}),
    "folded rsLoRA": (
        "fp32",
        {**LLAMA, "lora_alpha": 5, "use_rslora": True},
        {"fold_scale": True},
        {"v_proj": 0},
    ),
    "own patterns": (
        "fp32",
        {**LLAMA, "rank_pattern": {"mlp.*_proj": 4, "q_proj": 5}, "alpha_pattern": {"Q": 9, "q_proj": 7}},
        {},
        {"up_proj": 0, "0.self_attn.q_proj": 1},
    ),
    "own exclusions": (
        "fp32",
        {**LLAMA, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {},
        {"0.self_attn.v_proj": 0},
    ),
    "orthogonal start, odd ranks": ("fp32", {**LLAMA, "init_lora_weights": "orthogonal"}, {}, {"q_proj": 1}),
    "embeddings and a saved module": (
        "fp32",
        {**LLAMA, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"], "lora_alpha": 9},
        {},
        {"0.self_attn.q_proj": 2},
    ),
    "embeddings, folded": (
        "fp32",
        {**LLAMA, "target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 9},
        {"fold_scale": True},
        {"0.self_attn.q_proj": 2},
    ),
    "bf16": ("bf16", LLAMA, {}, {"q_proj": 0}),
    "4-bit base": ("4bit", LLAMA, {}, {"q_proj": 0, "gate_proj": 1}),
    "names that end in one another's": (
        "nested",
        NESTED,
        {},
        {"model.proj": 1, "block.block.proj": 3, "conv": 2},
    ),
    "left out among such names": ("nested", NESTED, {}, {"model.proj": 0, "block.block.proj": 3}),
    "the inner one left out": ("nested", NESTED, {}, {"block.block.proj": 0}),
}


def start(kind, config, base_folder):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            bases.make(kind, base_folder), LoraConfig(**config), autocast_adapter_dtype=kind != "bf16"
        )


def train(kind, model, optimizer, steps=4):
    for seed in range(steps):
        if kind == "nested":
            model(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        else:
            tiny.loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def grit(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # embeddings cannot be tapped
        return GritOptimizer(tiny.adamw(model), model, kfac_min_samples=1, min_lora_rank=0, **options)


def chosen(optimizer, by_end):
    """The ranks of a case: the longest end of a site's name decides."""
    ranks = {}
    for site in support.sites(optimizer):
        layer = site.name.removesuffix(f".{site.adapter}")
        ends = [end for end in by_end if layer.endswith(end)]
        ranks[site.name] = min(site.rank, by_end[max(ends, key=len)] if ends else site.rank // 2)
    return ranks


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A Llama whose layers are wide enough for bitsandbytes' 4-bit kernels on the CPU, which take 32 rows at a time."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=tiny.VOCABULARY,
            max_position_embeddings=64,
        )
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(base_folder, tmp_path_factory):
    """Every case trained, reduced and saved; then all loaded by one fresh process. name: report, folder, answers, model."""
    torch.set_num_threads(1)
    root, results = tmp_path_factory.mktemp("adapters"), {}
    for number, (name, (kind, config, arguments, by_end)) in enumerate(CASES.items()):
        model = start(kind, config, base_folder)
        optimizer = grit(model)
        train(kind, model, optimizer)
        optimizer.reduce_ranks_(chosen(optimizer, by_end))
        report = optimizer.save_adapter(root / str(number), **arguments)
        results[name] = [report, root / str(number), bases.answer(kind, model), model]
    jobs = [(kind, str(base_folder), str(root / str(i))) for i, (kind, *_) in enumerate(CASES.values())]
    torch.save(jobs, root / "jobs.pt")
    command = [sys.executable, bases.__file__, str(root / "jobs.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for result, loaded in zip(results.values(), torch.load(f"{root / 'jobs.pt'}.answers"), strict=True):
        result.append(loaded)
    return results


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_the_same(exported, name):
    _, _, trained, model, loaded = exported[name]
    kind = CASES[name][0]
    with model.disable_adapter():
        base = bases.answer(kind, model)
    moved = (trained - base).abs().max()
    assert moved > 1e-3, "the adapter does nothing, so this test sees nothing"
    tolerance = 0.02 * trained.abs().max() if kind == "bf16" else 2e-6 * max(1.0, trained.abs().max())
    assert (loaded - trained).abs().max() <= tolerance
    assert moved > 2 * tolerance


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_as_small_as_its_ranks(exported, name):
    report, path, *_ = exported[name]
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + sum(t.numel() * t.element_size() for t in tensors.values())
    pairs = {k: t for k, t in tensors.items() if "lora_A" in k or "lora_B" in k}
    assert sum(t.numel() for t in pairs.values()) == report.parameters < report.parameters_before
    shapes = {k.removesuffix(".lora_A.weight"): t.shape[0] for k, t in pairs.items() if "lora_A" in k}
    assert shapes == {f"base_model.model.{s.name}": s.rank for s in report.sites if s.rank}
    config = json.loads((path / "adapter_config.json").read_text())
    assert all(
        key.startswith("^") and key.endswith("$")
        for key in (*config["rank_pattern"], *config["alpha_pattern"])
    )
    assert {p.name for p in path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "grit_ranks.json",
    }


def test_half_the_parameters_are_half_the_bytes(base_folder, tmp_path):
    model = start("fp32", {**LLAMA, "r": 16, "lora_alpha": 16}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.save_adapter(tmp_path / "whole")
    optimizer.reduce_ranks_(0.45)
    optimizer.save_adapter(tmp_path / "half")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.5 * sizes[0]


def test_merging_the_exported_adapter_equals_merging_the_trained_one(exported, base_folder):
    *_, path, _, model, _ = exported["mixed ranks and left-out sites"]
    smaller = PeftModel.from_pretrained(bases.make("fp32", base_folder), path).merge_and_unload()
    merged = dict(model.merge_and_unload().named_parameters())
    untrained = dict(bases.make("fp32", base_folder).named_parameters())
    changed = 0
    for name, weight in smaller.named_parameters():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(weight, untrained[name])
    assert changed == 12, "all but the two layers that were left out"


def test_an_adapter_among_several(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    model.add_adapter("second", LoraConfig(**{**LLAMA, "r": 4, "lora_alpha": 7}))
    model.set_adapter("second")
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.reduce_ranks_(0.4)
    report = optimizer.save_adapter(tmp_path / "a")
    assert {s.rank_before for s in report.sites} == {4}
    fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path / "a", adapter_name="other")
    assert (bases.answer("fp32", fresh) - bases.answer("fp32", model)).abs().max() < 1e-6
    with pytest.raises(
        ValueError, match="adapter 'default' was trained elsewhere: this optimizer trains 'second'"
    ):
        optimizer.save_adapter(tmp_path / "b", adapter="default")
    with pytest.raises(ValueError, match=r"no adapter 'third'.*'default', 'second'"):
        optimizer.save_adapter(tmp_path / "b", adapter="third")
    with pytest.raises(ValueError, match="has several adapters"):
        export_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_the_report_says_of_losses_is_saved(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    predicted = optimizer.reduce_ranks_(0.3).predicted_loss
    saved = json.loads((optimizer.save_adapter(tmp_path), tmp_path / "grit_ranks.json")[1].read_text())
    assert predicted > 0
    assert saved["predicted_loss"] == pytest.approx(predicted)
    assert [s["rank"] for s in saved["sites"]] == list(optimizer.ranks().values())
    assert saved["parameters_before"] == optimizer.ranks().parameters_before


# ------------------------------------------------------------------ without an optimizer


def test_an_adapter_of_any_optimizer_is_exported_as_it_is(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    train("fp32", model, tiny.adamw(model))
    report = export_adapter(model, tmp_path)
    assert set(report.values()) == {6}
    assert report.predicted_loss is None
    fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path)
    assert torch.equal(bases.answer("fp32", fresh), bases.answer("fp32", model))


def test_tolerance_finds_the_rank_that_a_product_really_has(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    optimizer = grit(model, reprojection="two_sided", reprojection_freq=3, reprojection_k=2)
    train("fp32", model, optimizer)  # projected in its last step
    assert set(export_adapter(model, tmp_path / "rows").values()) == {6}, "no row is zero"
    report = export_adapter(model, tmp_path / "product", tolerance=1e-5)
    assert set(report.values()) == {2}
    fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path / "product")
    assert (bases.answer("fp32", fresh) - bases.answer("fp32", model)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="tolerance must be a share"):
        export_adapter(model, tmp_path, tolerance=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_saved_in_another_type(base_folder, tmp_path, dtype):
    """Half the bytes, and what is loaded is the trained adapter rounded once."""
    model = start("fp32", {**LLAMA, "modules_to_save": ["norm"]}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.reduce_ranks_(chosen(optimizer, {"q_proj": 0}))
    optimizer.save_adapter(tmp_path / "whole")
    report = optimizer.save_adapter(tmp_path / "rounded", dtype=dtype)
    whole, rounded = (load_file(tmp_path / name / export.WEIGHTS) for name in ("whole", "rounded"))
    assert whole.keys() == rounded.keys()
    assert all(torch.equal(t.to(dtype), rounded[key]) for key, t in whole.items())
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n), (
        "the model is left as it is"
    )
    assert report.as_dict() == optimizer.save_adapter(tmp_path / "whole").as_dict()
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (whole, rounded)]
    assert sizes[1] * 4 == sizes[0] * torch.finfo(dtype).bits // 8
    fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path / "rounded")
    worst = (bases.answer("fp32", fresh) - bases.answer("fp32", model)).abs().max()
    assert worst < 20 * torch.finfo(dtype).eps
    assert (worst > 1e-6) == (dtype != torch.float32)


def test_a_type_that_cannot_hold_the_adapter(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.save_adapter(tmp_path)
    before = load_file(tmp_path / export.WEIGHTS)
    support.sites(optimizer)[1].b.data[0, 0] = 1e5
    with pytest.raises(
        ValueError, match=r"float16 cannot hold values of .*k_proj.lora_B.weight \(at most 65504\)"
    ):
        optimizer.save_adapter(tmp_path, dtype=torch.float16)
    assert all(torch.equal(t, before[key]) for key, t in load_file(tmp_path / export.WEIGHTS).items())
    for wrong in (torch.int8, torch.float8_e4m3fn, "bf16"):
        with pytest.raises(ValueError, match="dtype must be one of"):
            export_adapter(model, tmp_path, dtype=wrong)


def test_a_bias_of_b_keeps_its_layer(base_folder, tmp_path):
    model = start("fp32", {**LLAMA, "lora_bias": True, "lora_alpha": 9}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.reduce_ranks_(chosen(optimizer, {"q_proj": 0}))
    for fold in (False, True):
        report = optimizer.save_adapter(tmp_path, fold_scale=fold)
        assert min(report.values()) == 1
        fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path)
        assert (bases.answer("fp32", fresh) - bases.answer("fp32", model)).abs().max() < 2e-6


REFUSED = {
    "DoRA": ({**LLAMA, "use_dora": True}, "uses DoRA, which divides by the norm"),
    "PiSSA": ({**LLAMA, "init_lora_weights": "pissa"}, "started with init_lora_weights='pissa'"),
    "untrained": (LLAMA, "no direction to save.*not been trained yet"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_that_cannot_be_exported(base_folder, tmp_path, config, message):
    model = start("fp32", config, base_folder)
    if message.startswith("started"):
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data[:, 3:] = 0
    with pytest.raises(ValueError, match=message):
        export_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_dora_is_refused_by_the_optimizer_too(base_folder, tmp_path):
    model = start("fp32", {**LLAMA, "use_dora": True}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    with pytest.raises(ValueError, match="uses DoRA"):
        optimizer.save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="uses DoRA"):
        optimizer.shrink_()


def test_hand_written_lora_is_no_peft_adapter(tmp_path):
    model = tiny.HandWritten()
    sites = [Site.from_modules("layer", model.down, model.up, model.scaling)]
    optimizer = GritOptimizer(tiny.adamw(model), model, sites=sites)
    with pytest.raises(ValueError, match=r"holds no PeftModel.*state_dict"):
        optimizer.save_adapter(tmp_path)


# ------------------------------------------------------------------ interrupted


@pytest.mark.parametrize(
    "place", ["save_file", "save_pretrained", "_carry_over", "_flush", "_take_the_place", "rename"]
)
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two steps"])
def test_an_interrupted_save_leaves_the_good_adapter(base_folder, tmp_path, monkeypatch, place, exchange):
    model = start("fp32", LLAMA, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.save_adapter(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    good = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    optimizer.reduce_ranks_(0.4)
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "save_file":
            patch.setattr("safetensors.torch.save_file", fail)
        elif place == "save_pretrained":
            patch.setattr(LoraConfig, "save_pretrained", fail)
        elif place == "rename":
            rename, calls = Path.rename, []

            def fail_second(self, target):
                calls.append(target)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return rename(self, target)

            patch.setattr(Path, "rename", fail_second)
        else:
            patch.setattr(folder, place, fail)
        if place == "rename" and exchange:
            optimizer.save_adapter(tmp_path / "a")  # needs no rename
            return
        with pytest.raises(KeyboardInterrupt):
            optimizer.save_adapter(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == good
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    optimizer.save_adapter(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < len(
        good["adapter_model.safetensors"]
    )
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_the_stale_weights_of_another_format_are_not_carried_over(base_folder, tmp_path):
    model = start("fp32", LLAMA, base_folder)
    train("fp32", model, tiny.adamw(model))
    (tmp_path / export.STALE_WEIGHTS).write_bytes(b"old")
    export_adapter(model, tmp_path)
    assert not (tmp_path / export.STALE_WEIGHTS).exists()


def small_llama(**settings):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "vocab_size": tiny.VOCABULARY,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings))


@pytest.mark.parametrize("how", ["save_adapter", "shrink_"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_trained_bias_keeps_its_layer(tmp_path, bias, how):
    """PEFT saves a layer's own bias with its adapter, and drops it where the layer is left out."""
    config = LoraConfig(r=4, target_modules="all-linear", bias=bias, task_type="CAUSAL_LM")
    model = get_peft_model(small_llama(attention_bias=True), config)
    optimizer = tiny.grit(model, min_lora_rank=0)
    tiny.train(model, optimizer, 3)
    optimizer.reduce_ranks_({name: 0 for name in optimizer.ranks() if "q_proj" in name or "up_proj" in name})
    expected = model.eval()(input_ids=tiny.tokens()).logits
    if how == "shrink_":
        optimizer.shrink_()
        model.save_pretrained(tmp_path)
    else:
        optimizer.save_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(small_llama(attention_bias=True), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tiny.tokens()).logits, expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("q_proj.lora_A" in name for name in saved)
    assert not any("up_proj.lora_A" in name for name in saved)


@pytest.mark.filterwarnings("ignore:GRIT leaves", "ignore::DeprecationWarning")
@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_experts_whose_weights_are_adapted_keep_rank_and_scale(tmp_path, pattern):
    def base():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "vocab_size": tiny.VOCABULARY,
        }
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads))

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules=["q_proj"],
        target_parameters=experts,
        **{pattern: dict.fromkeys(experts, 2)},
    )
    model = get_peft_model(base(), config)
    optimizer = tiny.grit(model)
    tiny.train(model, optimizer, 3)
    expected = model.eval()(input_ids=tiny.tokens()).logits
    export_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tiny.tokens()).logits, expected)


def test_an_adapter_that_has_diverged_is_named(tmp_path):
    model = tiny.llama(layers=1)
    tiny.trained(model)[1].data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"infinite or NaN in 1 layer\(s\) \(model.layers.0.self_attn.q_proj\)"
    ):
        export_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:GRIT leaves", "ignore::UserWarning:peft")
def test_a_head_that_shares_the_embeddings_adapter_is_saved_whole(tmp_path):
    """PEFT makes A and B of the head views of the embedding's B and A; cutting one would leave the other as it was."""
    config = LoraConfig(
        r=6,
        lora_alpha=6,
        target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"],
        ensure_weight_tying=True,
    )
    model = get_peft_model(small_llama(tie_word_embeddings=True), config)
    optimizer = tiny.grit(model, min_lora_rank=0)
    assert len(optimizer.ranks()) == 2
    tiny.train(model, optimizer, 3)
    optimizer.reduce_ranks_(0.5)
    expected = model.eval()(input_ids=tiny.tokens()).logits
    optimizer.save_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(small_llama(tie_word_embeddings=True), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tiny.tokens()).logits, expected)
