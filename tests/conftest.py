import os
import sys

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
def _own_accelerate():
    """Undo what TrainingArguments leave in the environment and in accelerate's state for others to find."""
    before = _accelerates_variables()
    for name in before:
        del os.environ[name]
    yield
    for name in _accelerates_variables():
        del os.environ[name]
    os.environ.update(before)
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def _accelerates_variables():
    return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}


def pytest_collection_modifyitems(items):
    """Leave out what needs a GPU where there is none, and say so."""
    if not torch.cuda.is_available():
        without = pytest.mark.skip(reason="needs a CUDA device; run with -m gpu where there is one")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(without)
