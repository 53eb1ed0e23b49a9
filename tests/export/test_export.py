"""Exported adapters: what they compute in a fresh process, and how large they are."""

import json
import subprocess
import sys

import bases
import pytest
import torch
from exporting import LLAMA, chosen, grit, start, train
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from grit_optim import export_adapter

NESTED = {"r": 4, "lora_alpha": 6, "target_modules": ["proj", "conv"]}


# name: base, LoraConfig, arguments of save_adapter, ranks by the end of a layer's name (elsewhere half)
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


@pytest.fixture(scope="module")
def exported(base_folder, tmp_path_factory):
    """Every case trained and saved, then loaded in one fresh process.

    Name to report, folder, answers, model, and the answers of the loaded one.
    """
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
    assert sum(t.numel() for t in pairs.values()) == report.parameters
    if "embeddings" not in name or "folded" not in name:  # folded, all are as large as the whole embedding's
        assert report.parameters < report.parameters_before
    shapes = {k.removesuffix(".lora_A.weight"): t.shape[0] for k, t in pairs.items() if "lora_A" in k}
    assert shapes == {s.name.removesuffix(".default"): s.rank for s in report.sites if s.rank}
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
