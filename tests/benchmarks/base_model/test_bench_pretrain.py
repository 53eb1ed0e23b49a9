"""The training of the base model: what it writes, how it goes on after a stop, its batches."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.base_model import load as base_model
from benchmarks.base_model import pretrain
from benchmarks.core.files import BenchmarkError


@pytest.fixture
def little_data(monkeypatch, tokenizer):
    """A corpus of a few thousand tokens in place of the standard library."""
    texts = ["def add(a, b):\n    return a + b\n" * 40] * 6
    packed = pretrain.pack(tokenizer, texts)
    data = pretrain.Data(tokenizer, packed, packed[:600], {"fingerprint": "x"})
    monkeypatch.setattr(pretrain, "load_data", lambda: data)
    return data


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """One thin layer: where a processor has no bf16 products, a step of the whole takes some ten seconds."""
    whole = base_model.model_config()
    thin = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2)
    small = type(whole).from_dict({**whole.to_dict(), **thin, **heads})
    monkeypatch.setattr(base_model, "model_config", lambda: small)


SMALL = pretrain.PretrainConfig(steps=2, batch_size=2, context=32, threads=1)


def test_pretraining_writes_a_model_that_loads(tmp_path, little_data):
    record = pretrain.pretrain(SMALL, tmp_path)
    assert record["steps"] == 2
    assert record["curve"][-1]["train"] < math.log(base_model.VOCABULARY) + 0.5
    assert json.loads((tmp_path / "training_record.json").read_text()) == record
    assert not (tmp_path / pretrain.CHECKPOINT).exists()
    model, tokenizer = base_model.load_base_model(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.1 * model.num_parameters(), "bf16"
    assert next(model.parameters()).dtype == torch.float32
    loss = pretrain.heldout_loss(model, little_data.heldout, 32)
    assert loss == pytest.approx(record["heldout_loss_of_bf16_file"], abs=1e-4)
    assert tokenizer.encode("<pad><eos><blank><answer>").ids == [0, 1, 2, 3]


def test_pretraining_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path, little_data):
    whole = pretrain.Pretraining(SMALL)
    pretrain.train(whole, little_data, tmp_path / "unused")
    first, batches = pretrain.Pretraining(SMALL), pretrain.Batches(little_data.train, SMALL)
    first.train_step(batches(first.step))
    first.step += 1
    first.save(tmp_path / pretrain.CHECKPOINT)
    second = pretrain.Pretraining(SMALL)
    second.load(tmp_path / pretrain.CHECKPOINT)
    pretrain.train(second, little_data, tmp_path / "unused")
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, msg=name)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    pretrain.Pretraining(SMALL).save(tmp_path / "checkpoint.pt")
    with pytest.raises(BenchmarkError, match="belongs to another configuration"):
        pretrain.Pretraining(dataclasses.replace(SMALL, seed=1)).load(tmp_path / "checkpoint.pt")


def test_contexts_of_an_epoch_do_not_overlap():
    stream = torch.arange(1000)
    batches = pretrain.Batches(stream, dataclasses.replace(SMALL, batch_size=4, context=9))
    drawn = torch.cat([batches(step) for step in range(24)])
    assert drawn.shape == (96, 10)
    assert len(drawn.unique()) == drawn.numel()
    assert torch.equal(batches(3), batches(3))
    assert not torch.equal(batches(3), batches(3 + 24))


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_missing_base_model_says_how_to_make_it(tmp_path, missing):
    for name in {"tokenizer.json", "config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).write_bytes((base_model.FOLDER / name).read_bytes())
    with pytest.raises(BenchmarkError, match=rf"{missing}.*python -m benchmarks pretrain --out"):
        base_model.load_base_model(tmp_path)
