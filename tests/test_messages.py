"""A warning names the line of whoever called the package, from wherever inside it comes."""

from pathlib import Path

import pytest
import tiny
import torch

from grit_optim.capture.bypass import PATIENCE

OTHER = "none of its 7 LoRA site"


def lines(told, words):
    """The source lines that the warnings with these words name; they lie in this file."""
    found = [w for w in told if words in str(w.message)]
    assert {Path(w.filename) for w in found} == {Path(__file__)}
    return {Path(w.filename).read_text().splitlines()[w.lineno - 1].strip() for w in found}


def test_the_caller_of_step_is_named():
    optimizer, other = tiny.grit(tiny.llama(layers=1)), tiny.llama(layers=1)

    def loop():
        for _ in range(5):
            tiny.loss_of(other).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=OTHER) as told:
        loop()
    assert lines(told, OTHER) == {"optimizer.step()"}


def test_so_is_one_with_a_closure_and_a_scheduler_between():
    optimizer, other = tiny.grit(tiny.llama(layers=1)), tiny.llama(layers=1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps step() once more

    def closure():
        loss = tiny.loss_of(other)
        loss.backward()
        return loss

    def loop():
        for _ in range(5):
            optimizer.step(closure)

    with pytest.warns(UserWarning, match=OTHER) as told:
        loop()
    assert lines(told, OTHER) == {"optimizer.step(closure)"}


def test_the_caller_of_the_model_is_named_where_a_hook_finds_out():
    model = tiny.llama(layers=1)
    optimizer = tiny.grit(model)

    def loop():
        for seed in range(PATIENCE + 1):
            model(input_ids=tiny.tokens(seed)).logits.square().mean().backward()
            optimizer.base.step()
            optimizer.base.zero_grad()

    with pytest.warns(UserWarning, match="by somebody else") as told:
        loop()
    assert lines(told, "by somebody else") == {
        "model(input_ids=tiny.tokens(seed)).logits.square().mean().backward()"
    }
