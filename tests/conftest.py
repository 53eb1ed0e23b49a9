import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices only lose by threads, and the numbers do not depend on how busy the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_precision():
    """transformers' TrainingArguments leave a run's precision in the environment, where the next Accelerator finds it."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.pop(name, None)
    yield
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before


def pytest_collection_modifyitems(items):
    """Leave out what needs a GPU where there is none, and say so."""
    if not torch.cuda.is_available():
        without = pytest.mark.skip(reason="needs a CUDA device; run with -m gpu where there is one")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(without)
