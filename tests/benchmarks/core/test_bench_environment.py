"""What the machine can do is said before a long stay on it, not found out after."""

import math
import warnings

import pytest

from benchmarks.core import environment
from benchmarks.core.results import RunConfig
from benchmarks.training import runner

BF16 = RunConfig("naming", "adamw", 0.01, 0, precision="bf16")


@pytest.fixture
def on_a_processor(monkeypatch):
    """A function that makes the processor's bf16 so many times as slow as its fp32."""

    def make(slowdown):
        monkeypatch.setattr(environment, "bf16_slowdown", lambda: slowdown)

    return make


def test_the_slowdown_is_measured():
    found = environment.bf16_slowdown()
    assert math.isfinite(found)
    assert found > 0


def test_slow_bf16_is_said_before_the_runs_with_the_factor_and_the_way_out(
    on_a_processor, monkeypatch, tmp_path
):
    begun = []
    monkeypatch.setattr(runner, "in_process", lambda call, config, *others: begun.append(config))
    on_a_processor(23.4)
    with pytest.warns(UserWarning, match="23 times as long as in fp32.*--precision fp32 with another --out"):
        assert runner.execute_all([BF16], tmp_path, jobs=1) == {}
    assert begun == [BF16]  # a warning: whoever goes on with a folder in bf16 may


@pytest.mark.parametrize(
    ("slowdown", "precision", "device"), [(1.1, "bf16", "cpu"), (30.0, "fp32", "cpu"), (30.0, "bf16", "cuda")]
)
def test_nothing_is_said_where_it_does_not_matter(slowdown, precision, device, on_a_processor):
    on_a_processor(slowdown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.warn_if_bf16_is_slow(precision, device)
