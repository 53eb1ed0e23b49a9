"""torch.compile: taps set before the first compiled call are part of it; later ones are warned of."""

import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_optimizer_built_before_the_first_compiled_call_sees_the_same_factors():
    factors = []
    for compiled in (True, False):
        model = tiny.llama(layers=1, init_lora_weights=False)
        optimizer = tiny.grit(model, fisher_decay=None)
        tiny.train(torch.compile(model, backend="eager") if compiled else model, optimizer, 1)
        assert optimizer.telemetry()["engaged_sites"] == 7
        factors.append(optimizer.curvature[0].factors)
    assert factors[0].activation_samples.tolist() == factors[1].activation_samples.tolist()
    torch.testing.assert_close(factors[0].activation, factors[1].activation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors[0].gradient, factors[1].gradient, rtol=1e-4, atol=1e-5)


def test_an_optimizer_built_after_it_says_that_its_taps_see_nothing():
    model = tiny.llama(layers=1)
    compiled = torch.compile(model, backend="eager")
    tiny.loss_of(compiled).backward()
    model.zero_grad()
    optimizer = tiny.grit(model, capture="taps")
    with pytest.warns(UserWarning, match=r"GRIT does nothing for 7 site\(s\).*Leave out capture='taps'"):
        tiny.train(compiled, optimizer, 3)
    assert optimizer.telemetry()["engaged_sites"] == 0
