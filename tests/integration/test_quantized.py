"""QLoRA on the CPU: NF4 with double quantisation and 8-bit, prepared as PEFT prepares it."""

import warnings

import pytest
import tiny
import torch

from grit_optim import GritOptimizer

bitsandbytes = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf import QUANTIZED, Stop, assert_same, qlora, run  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model on disk, wide enough for bitsandbytes' kernels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def paged(model):
    return bitsandbytes.optim.PagedAdamW8bit(tiny.trained(model), lr=1e-2, min_8bit_size=16)


@pytest.mark.parametrize("make", [tiny.adamw, paged], ids=["adamw", "paged-8bit"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_qlora_trains_and_its_taps_agree(folder, kind, make):
    model = qlora(folder, kind)
    optimizer = GritOptimizer(make(model), model, kfac_min_samples=8)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(GRIT|Grit).*")
        before = tiny.loss_of(model, 0).item()
        for _ in range(6):
            tiny.loss_of(model, 0).backward()
            assert {report.status for report in optimizer.check_capture()} <= {"ok", "unknown"}
            optimizer.step()
            optimizer.zero_grad()
    assert tiny.loss_of(model, 0).item() < before
    assert optimizer.telemetry()["engaged_sites"] == 7
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_qlora_in_the_trainer_resumes_exactly(folder, kind, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}

    def started():
        model = qlora(folder, kind, checkpointing=False)
        return model, GritOptimizer(paged(model), model, kfac_min_samples=8)

    whole, optimizer = started()
    run(tmp_path / "whole", whole, (optimizer, None), **saving).train()
    first, interrupted = started()
    run(tmp_path / "part", first, (interrupted, None), callbacks=[Stop(3)], **saving).train()
    second, fresh = started()
    run(tmp_path / "part", second, (fresh, None), **saving).train(resume_from_checkpoint=True)
    assert_same(second, whole)
    assert fresh.telemetry(per_site=False)["steps"] == 6
