"""A step launches as many kernels for many sites of a shape as for few: they are stacked, not looped over."""

from collections import Counter

import pytest
from tiny import grit, llama, loss_of, train
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# These make another view of the same memory, or take memory, and launch nothing.
VIEWS = (
    "empty_like",
    "detach",
    "view",
    "select",
    "unsqueeze",
    "transpose",
    "expand",
    "slice",
    "unbind",
    "alias",
    "diagonal",
    "split",
)


class Count(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.").lstrip("_").split(".")[0]
        if name not in VIEWS and name != "unsafe_view":
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def launched(layers, mode, **options):
    """Operations of one step in the steady state, without the base optimizer's own."""
    model = llama(layers=layers)
    optimizer = grit(model, precondition=mode, **options)
    train(model, optimizer, 4)  # the first steps compare taps and gradients
    loss_of(model, 9).backward()
    own = optimizer.base.step

    def uncounted(*arguments, **keywords):
        with _disable_current_modes():
            return own(*arguments, **keywords)

    optimizer.base.step = uncounted
    with Count() as count:
        optimizer.step()
    return count.operations


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced"])
def test_launches_do_not_grow_with_the_number_of_sites(mode):
    few, many = launched(2, mode), launched(5, mode)
    assert sum(few.values()) > 50
    assert few == many


def test_nor_do_those_of_a_reprojection():
    options = {"reprojection": "balanced", "reprojection_freq": 1, "rank_budget": 0.5, "min_lora_rank": 1}
    assert launched(2, "spectral", **options) == launched(5, "spectral", **options)
