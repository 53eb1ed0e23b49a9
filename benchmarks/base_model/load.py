"""The embedded base model: a small Llama over Python source, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..core.files import BenchmarkError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

FOLDER = Path(__file__).resolve().parent
PAD, EOS, BLANK, ANSWER = "<pad>", "<eos>", "<blank>", "<answer>"
SPECIAL_TOKENS = (PAD, EOS, BLANK, ANSWER)  # their ids are 0, 1, 2, 3
VOCABULARY = 2048
MAX_POSITIONS = 512  # tokens that the model reads at a time
_REMEDY = "make it with: python -m benchmarks pretrain --out benchmarks/base_model"
_Model = TypeVar("_Model", bound="PreTrainedModel")


def model_config() -> LlamaConfig:
    """The architecture: hidden 256, 4 layers of 4 heads, about 3.7 M parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        bos_token_id=None,
        attention_dropout=0.0,
    )


def load_tokenizer(folder: Path = FOLDER) -> Tokenizer:
    """The byte-level BPE tokenizer with 2,048 tokens."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BenchmarkError(f"the base model's tokenizer is missing: {path}; {_REMEDY}")
    return Tokenizer.from_file(str(path))


def load_base_model(folder: Path = FOLDER) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The pretrained model (fp32, on the CPU, in eval mode) and its tokenizer, from `folder`."""
    from transformers import LlamaForCausalLM

    tokenizer = load_tokenizer(folder)
    return read_model(LlamaForCausalLM, folder, "the base model", _REMEDY), tokenizer


def read_model(kind: type[_Model], folder: Path, name: str, remedy: str) -> _Model:
    """A pretrained model of that class, in fp32, on the CPU, in eval mode.

    Where a file is missing, the error calls the model by its `name` and says what to do.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per run is enough, and this one lasts a moment
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise BenchmarkError(f"{name} is incomplete: {folder / file} is missing; {remedy}")
    # At these lengths the plain products are a fifth faster on a CPU than the fused attention.
    model: Any = kind.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    return model.eval()


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write configuration and weights, in bf16, in which the model is afterwards."""
    model.bfloat16().save_pretrained(folder)
    # The library writes 0600, which would follow the file into a repository.
    (folder / "model.safetensors").chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)  # nothing here reads it
