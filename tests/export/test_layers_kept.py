"""Layers that hold more than a pair of matrices: biases, experts, heads tied to the embedding."""

import bases
import pytest
import tiny
import torch
from exporting import LLAMA, SMALL, chosen, grit, small_llama, start, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from grit_optim import export_adapter


def test_a_bias_of_b_keeps_its_layer(base_folder, tmp_path):
    model = start("fp32", {**LLAMA, "lora_bias": True, "lora_alpha": 9}, base_folder)
    optimizer = grit(model)
    train("fp32", model, optimizer)
    optimizer.reduce_ranks_(chosen(optimizer, {"q_proj": 0}))
    for fold in (False, True):
        report = optimizer.save_adapter(tmp_path, fold_scale=fold)
        assert min(report.values()) == (3 if fold else 1), "folded, all are padded to one rank"
        fresh = PeftModel.from_pretrained(bases.make("fp32", base_folder), tmp_path)
        assert (bases.answer("fp32", fresh) - bases.answer("fp32", model)).abs().max() < 2e-6


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
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        return MixtralForCausalLM(MixtralConfig(**SMALL, **heads))

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


@pytest.mark.filterwarnings("ignore:GRIT leaves", "ignore::UserWarning:peft")
def test_a_head_that_shares_the_embeddings_adapter_is_saved_whole(tmp_path):
    """The head's A and B are views of the embedding's B and A in PEFT: cutting one would leave the other."""
    config = LoraConfig(
        r=6,
        lora_alpha=6,
        target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"],
        ensure_weight_tying=True,
    )
    model = get_peft_model(small_llama(tie_word_embeddings=True), config)
    optimizer = tiny.grit(model, min_lora_rank=0)
    assert len(optimizer.ranks()) == 3  # the embedding's pair too, but not the head's
    tiny.train(model, optimizer, 3)
    optimizer.reduce_ranks_(0.5)
    expected = model.eval()(input_ids=tiny.tokens()).logits
    optimizer.save_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(small_llama(tie_word_embeddings=True), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tiny.tokens()).logits, expected)
