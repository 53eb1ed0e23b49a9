"""A tiny model, made once for the folder."""

import pytest
from tiny_models import save_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny Llama with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny_llama"))
