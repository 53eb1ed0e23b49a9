"""The frozen runs come out as they did, and checkpoints of before load and go on as their run did.

Where torch and the processor's kernels are those that the file was written with, to the bit; elsewhere within
what rounding becomes in so few steps.
"""

import json
import re

import pytest
import torch
from golden import cases

GOLDEN = json.loads(cases.FILE.read_text(encoding="utf8"))
HERE = cases.arithmetic()
LATER = re.compile("/by_gradients|/watch/")
"""Entries that the first version's checkpoints do not have."""
ROUNDING = 2e-3
"""Share of the weights' norm that differences in the last bit may grow to in nine steps."""


def check(name, weights):
    golden, found = GOLDEN[name], cases.probe(weights)
    if HERE in golden["bits"]:
        assert cases.bits(weights) == golden["bits"][HERE]
    assert found == pytest.approx(golden["probe"], abs=ROUNDING * golden["probe"][0])


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.filterwarnings("ignore")
def test_run(name):
    check(f"run: {name}", cases.run(name))


@pytest.mark.parametrize("name", cases.SAVED)
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_before(name):
    check(f"resume: {name}", cases.resume(name))


@pytest.mark.parametrize("name", cases.SAVED)
@pytest.mark.filterwarnings("ignore")
def test_state_dict_keeps_its_names(name):
    """Whoever wrote the checkpoint can read ours: the same keys, shapes and types. Later ones are ignored."""
    saved = torch.load(cases.CHECKPOINTS / f"{name}.pt", weights_only=True)
    _, optimizer = cases.load(name)
    found = [key for key in cases.keys_of(optimizer.state_dict()) if not LATER.search(key)]
    assert found == cases.keys_of(saved["optimizer"])
