import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A saved Llama, wide enough for bitsandbytes' 4-bit kernels on the CPU, which take 32 rows at a time."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=tiny.VOCABULARY,
            max_position_embeddings=64,
        )
    ).save_pretrained(path)
    return path
