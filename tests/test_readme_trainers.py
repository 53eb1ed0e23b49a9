"""The README's matrix of trainers: every row is a test that exists and a version that is pinned; its recipe runs."""

import ast
import re
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
ROWS = re.findall(r"^\| (.+?) \| (\w+) ([\d.]+) \| .+ \| (tests/\w+\.py)::(\w+) \|$", README, flags=re.MULTILINE)


def test_every_row_names_a_pinned_version_and_a_test_that_exists():
    pins = dict(re.findall(r'"([\w-]+)==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf8")))
    assert len(ROWS) == 19
    for client, package, version, path, name in ROWS:
        assert pins[package] == version, client
        functions = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)}
        assert name in functions, client


def test_the_qlora_recipe_runs(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128,
        vocab_size=tiny.VOCABULARY, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    code = re.search(r"```python\n(# qlora\n.+?)```", README, flags=re.DOTALL).group(1)
    assert code.count("bf16=True") == 1
    code = code.replace("bf16=True", "bf16=True, use_cpu=True")  # the Trainer wants to be told that this is no accident
    examples = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=32)]
    names = {"model_id": str(tmp_path / "base"), "dataset": examples, "output_dir": str(tmp_path / "out")}
    exec(compile(code, "README.md", "exec"), names)
    told = names["optimizer"].telemetry(per_site=False)
    assert (told["steps"], told["engaged_sites"]) == (4, 7)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
