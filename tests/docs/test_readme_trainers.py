"""The matrix of trainers: every row is a test that exists and a version that is pinned; the README's recipe runs."""

import ast
import re
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).parent.parent
README, MATRIX = ((ROOT / path).read_text(encoding="utf8") for path in ("README.md", "docs/trainers.md"))
ROWS = re.findall(
    r"^\| (.+?) \| (\w+) ([\d.]+) \| .+ \| (tests/[\w/]+\.py)::(\w+) \|$", MATRIX, flags=re.MULTILINE
)
EXTRAS = ("bench", "peers", "trainers", "trainers4")


def pins():
    """Package to the versions that the extras pin."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    found = {}
    for extra in EXTRAS:
        listed = re.search(rf"^{extra} = \[\n(.+?)^\]", text, flags=re.MULTILINE | re.DOTALL).group(1)
        for package, version in re.findall(r'"([\w-]+)==([\d.]+)"', listed):
            found.setdefault(package, set()).add(version)
    return found


def test_every_row_names_a_pinned_version_and_a_test_that_exists():
    assert len(ROWS) == 36
    assert {version for _, package, version, *_ in ROWS if package == "transformers"} == pins()[
        "transformers"
    ]
    for client, package, version, path, name in ROWS:
        assert version in pins()[package], client
        functions = {
            n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)
        }
        assert name in functions, client


def test_the_versions_that_exclude_each_other_are_run_by_the_files_of_their_rows():
    """The command for the other environment names every file that a row for it names."""
    command = re.search(r"^\.venv4/bin/python -m pytest (.+)$", MATRIX, flags=re.MULTILINE).group(1)
    files = {path.relative_to(ROOT).as_posix() for pattern in command.split() for path in ROOT.glob(pattern)}
    older = {
        path for _, package, version, path, _ in ROWS if (package, version) == ("transformers", "4.57.6")
    }
    assert len(older) == 4
    assert older <= files
    assert all(next(ROOT.glob(pattern), None) for pattern in command.split())


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
    code = code.replace(
        "bf16=True", "bf16=True, use_cpu=True"
    )  # the Trainer wants to be told that this is no accident
    examples = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=32)]
    names = {"model_id": str(tmp_path / "base"), "dataset": examples, "output_dir": str(tmp_path / "out")}
    exec(compile(code, "README.md", "exec"), names)
    told = names["optimizer"].telemetry(per_site=False)
    assert (told["steps"], told["engaged_sites"]) == (4, 7)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
