"""Adapters as other programs apply them: each one's rule for the scale, in our words, on the saved files."""

import json
import math
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tiny
import torch
from exporting import LLAMA, chosen, grit, small_llama, start, train
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from grit_optim import export_adapter
from grit_optim.export.files import EMBEDDING_A, LORA_A, LORA_B, PREFIX, WEIGHTS

# What each program multiplies B·A by, from the configuration and the rank of the tensors at hand. Read in the
# sources named in docs/adapters.md.
RULES = {
    # convert_lora_to_gguf.py keeps lora_alpha alone; the program divides by the rank of each B, and takes an
    # alpha of zero for a scale of 1.
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank if config["lora_alpha"] else 1.0,
    # one scale for all layers, from r and lora_alpha; knows rsLoRA
    "vLLM": lambda config, rank: (
        config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    ),
    # one scale for all layers, and no rsLoRA
    "ExLlamaV2": lambda config, rank: config["lora_alpha"] / config["r"],
}


@torch.no_grad()
def answer(model):
    return model.eval()(input_ids=tiny.tokens()).logits


@torch.no_grad()
def applied(base, path, rule):
    """The logits of ``base`` with the adapter at ``path`` merged by a program's rule."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / WEIGHTS)
    for key, a in tensors.items():
        if key.endswith(LORA_A):
            layer, b = base.get_submodule(key[len(PREFIX) : -len(LORA_A)]), key[: -len(LORA_A)] + LORA_B
            layer.weight += rule(config, a.shape[0]) * (tensors[b] @ a)
        elif key.endswith(EMBEDDING_A):
            layer, b = base.get_submodule(key[len(PREFIX) : -len(EMBEDDING_A)]), key[:-1] + "B"
            layer.weight += rule(config, a.shape[0]) * (tensors[b] @ a).T
    return answer(base)


def started(ranks, alpha, rslora, embedding, seed):
    """A LoRA model whose layers use no more than ``ranks`` directions, by turns, and what it computes."""
    targets = ["q_proj", "v_proj", "up_proj", "down_proj", *(["embed_tokens"] if embedding else [])]
    config = LoraConfig(r=5, lora_alpha=alpha, use_rslora=rslora, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(small_llama(), config)
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if "default" in getattr(m, "lora_B", {})]
    for layer, rank in zip(layers, ranks, strict=True):
        b = layer.lora_B["default"].weight.data
        b.normal_(0, 0.3, generator=generator)[:, rank:] = 0
    for layer in model.modules():
        if "default" in getattr(layer, "lora_embedding_A", {}):
            layer.lora_embedding_A["default"].data.normal_(0, 0.3, generator=generator)
    return model


@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any),
    alpha=st.sampled_from([1, 3, 5, 16, 2.5]),
    rslora=st.booleans(),
    embedding=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_folded_adapter_is_right_under_every_rule(ranks, alpha, rslora, embedding, seed):
    model = started(ranks, alpha, rslora, embedding, seed)
    expected = answer(model)
    with model.disable_adapter():
        assert (expected - answer(model)).abs().max() > 1e-4
    with TemporaryDirectory() as folder:
        export_adapter(model, folder, fold_scale=True)
        found = {name: applied(small_llama(), Path(folder), rule) for name, rule in RULES.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found["PEFT"] = answer(PeftModel.from_pretrained(small_llama(), folder))
        shapes = {t.shape[0] for k, t in load_file(f"{folder}/{WEIGHTS}").items() if "_A" in k}
        config = json.loads(Path(folder, "adapter_config.json").read_text())
    for logits in found.values():
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert shapes == {config["r"]}, "SGLang and TGI stack the layers, and need one rank"
    assert type(config["lora_alpha"]) is int, "Ollama reads a whole number"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]


def test_what_the_page_says_of_adapters_that_are_not_folded(tmp_path):
    """One scale and mixed ranks: right in vLLM, wrong in llama.cpp. The test above would see it."""
    model = started([1, 5, 2, 3], alpha=10, rslora=False, embedding=False, seed=0)
    export_adapter(model, tmp_path)
    found = {name: applied(small_llama(), tmp_path, rule) for name, rule in RULES.items()}
    right = {name for name, logits in found.items() if torch.allclose(logits, answer(model), atol=1e-5)}
    assert right == {"vLLM", "ExLlamaV2"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_an_optimizers_mixed_ranks_are_right_in_llama_cpp(base_folder, tmp_path, dtype):
    model = start("fp32", {**LLAMA, "lora_alpha": 11}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.reduce_ranks_(chosen(optimizer, {"q_proj": 1, "v_proj": 5, "up_proj": 0}))
    report = optimizer.save_adapter(tmp_path, fold_scale=True, dtype=dtype)
    assert set(report.values()) == {0, 5}, "the report counts what lies in the file"
    assert set(optimizer.ranks().values()) == {0, 1, 3, 5}
    base = start("fp32", LLAMA, base_folder).unload()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is None else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(applied(base, tmp_path, RULES["llama.cpp"]), answer(model), **tolerance)


def test_a_start_that_other_programs_do_not_repeat_is_refused(base_folder, tmp_path):
    model = start("fp32", {**LLAMA, "init_lora_weights": "olora"}, base_folder)
    export_adapter(model, tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"init_lora_weights='olora'.*other programs \(fold_scale\) take out"
    ):
        export_adapter(model, tmp_path / "folded", fold_scale=True)
    assert not (tmp_path / "folded").exists()
