"""One run: it repeats, its precision, its curve, its divergence."""

import dataclasses
import json

import pytest
import torch

from benchmarks.core.results import RunConfig
from benchmarks.training.train import Run, train


def config(**changes):
    return dataclasses.replace(
        RunConfig("naming", "adamw", 5e-3, 0, steps=3, batch_size=4, eval_every=2), **changes
    )


def test_runs_repeat_and_start_from_the_same_adapter(small_task):
    runs = [Run(config(), small_task), Run(config(), small_task), Run(config(seed=1), small_task)]
    weights = [run.model.state_dict() for run in runs]
    key = next(name for name in weights[0] if "lora_A" in name)
    assert torch.equal(weights[0][key], weights[1][key])
    assert not torch.equal(weights[0][key], weights[2][key])
    assert [train(run) for run in runs[:2]] == [False, False]
    assert runs[0].losses == runs[1].losses
    assert [p["loss"] for p in runs[0].curve] == [p["loss"] for p in runs[1].curve]
    assert [p["step"] for p in runs[0].curve] == [0, 2, 3]


def test_bf16_keeps_the_adapter_in_fp32_and_the_losses_near(small_task):
    runs = [Run(config(precision=precision, eval_every=3), small_task) for precision in ("fp32", "bf16")]
    kinds = {(p.requires_grad, p.dtype) for p in runs[1].model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert [train(run) for run in runs] == [False, False]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=0.01)
    assert runs[0].losses != runs[1].losses


def test_a_curve_without_points_between_is_its_end_alone(small_task):
    run = Run(config(eval_every=3), small_task)
    assert not train(run)
    assert [p["step"] for p in run.curve] == [3]


def test_a_diverged_run_is_recorded_as_such(small_task):
    run = Run(config(lr=1e30), small_task)
    assert train(run)
    result = run.result(True)
    assert result["final_loss"] is None
    assert result["exact_match"] is None
    json.dumps(result, allow_nan=False)
