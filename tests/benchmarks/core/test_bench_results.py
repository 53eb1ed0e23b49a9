"""Result files: round trip, skipping, refusal of what does not belong together."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.core.files import BenchmarkError, write_json, write_text
from benchmarks.core.results import RunConfig, is_done, read_result, read_results, write_result
from benchmarks.training.optimizers import OPTIMIZERS, Settings, make_optimizer, state_bytes
from benchmarks.training.train import learning_rate_scale, plain

CONFIG = RunConfig("naming", "adamw", 0.01, 0, steps=100, eval_every=50)


def test_round_trip(tmp_path, made_up_result):
    result = made_up_result()
    path = write_result(tmp_path, result)
    assert read_result(path) == {"format": 1, **result}
    assert read_results(tmp_path) == [read_result(path)]
    assert [p.name for p in tmp_path.iterdir()] == [CONFIG.file_name()]


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"seed": 1},
        {"beta1": 0.6},
        {"steps": 200},
        {"options": {"precondition": "none"}},
        {"device": "cuda"},
        {"base": "smollm2"},
        {"adapted_layers": 8},
    ],
)
def test_every_setting_changes_the_name(change):
    assert replace(CONFIG, **change).file_name() != CONFIG.file_name()


def test_results_from_before_a_setting_came_keep_their_name_and_count(tmp_path, made_up_result):
    assert RunConfig("naming", "adamw", 0.01, 0).file_name() == "naming-adamw-lr0.01-seed0-445ec5fc7a.json"
    result = made_up_result()
    for name in ("base", "adapted_layers"):
        del result["config"][name]
    write_result(tmp_path, result)
    assert is_done(tmp_path, CONFIG, "f" * 64)
    assert not is_done(tmp_path, replace(CONFIG, base="smollm2"), "f" * 64)


def test_done_only_with_the_same_configuration_and_data(tmp_path, made_up_result):
    write_result(tmp_path, made_up_result())
    assert is_done(tmp_path, CONFIG, "f" * 64)
    assert not is_done(tmp_path, replace(CONFIG, seed=1), "f" * 64)
    with pytest.raises(BenchmarkError, match=r"other data or another base model.*choose another --out"):
        is_done(tmp_path, CONFIG, "0" * 64)


def test_a_name_that_lies_about_its_configuration(tmp_path, made_up_result):
    write_json(tmp_path / CONFIG.file_name(), {"format": 1, **made_up_result(config={"lr": 0.5})})
    with pytest.raises(BenchmarkError, match="another configuration than its name says"):
        is_done(tmp_path, CONFIG, "f" * 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[]", "is no result of a run"), ('{"curve": []}', "config, diverged.* missing")],
)
def test_unreadable_results_are_named(tmp_path, text, message):
    path = tmp_path / "naming-adamw-lr1-seed0-x.json"
    write_text(path, text)
    with pytest.raises(BenchmarkError, match=rf"seed0-x\.json.*{message}"):
        read_results(tmp_path)


def test_another_format_is_refused(tmp_path, made_up_result):
    path = tmp_path / "naming-adamw-lr1-seed0-x.json"
    write_json(path, {**made_up_result(), "format": 99})
    with pytest.raises(BenchmarkError, match="has format 99, this program reads 1"):
        read_result(path)


@pytest.mark.parametrize("folder", ["absent", "."])
def test_nothing_to_read(tmp_path, folder):
    with pytest.raises(BenchmarkError, match="run first: python -m benchmarks run"):
        read_results(tmp_path / folder)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_plain_data_is_json_without_nan():
    value = {1: torch.tensor([1.5, math.inf]), "b": (True, None, math.nan), "c": [torch.float32]}
    assert plain(value) == {"1": [1.5, None], "b": [True, None, None], "c": ["torch.float32"]}


def test_state_bytes_counts_nested_tensors():
    state = {"state": {0: {"m": torch.zeros(3, 4), "n": [torch.zeros(5, dtype=torch.float64)]}}, "lr": 0.1}
    assert state_bytes(state) == 3 * 4 * 4 + 5 * 8


def test_adamw_state_bytes_of_a_step():
    model = torch.nn.Linear(4, 3)
    optimizer = make_optimizer("adamw", model, Settings(0.1))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert (
        state_bytes(optimizer.state_dict()) == 2 * (12 + 3) * 4 + 2 * 4
    )  # two moments, one step count per tensor


def test_settings_reach_the_optimizer():
    made = make_optimizer("adamw", torch.nn.Linear(4, 3), Settings(0.1, (0.6, 0.95), 0.2, {"amsgrad": True}))
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (
        0.1,
        (0.6, 0.95),
        0.2,
        True,
    )


def test_unknown_optimizer_lists_the_known():
    with pytest.raises(BenchmarkError, match="unknown optimizer 'sgdx'; known: adamw, adamw8bit, grit"):
        make_optimizer("sgdx", torch.nn.Linear(2, 2), Settings(0.1))


def test_the_optimizers_that_the_documents_name_are_there():
    modes = {f"grit-{mode}" for mode in ("eigenbasis", "balanced", "inverse", "none", "paper")}
    assert modes | {"adamw", "grit"} <= set(OPTIMIZERS)


def test_learning_rate_goes_up_over_the_warmup_and_down_to_zero():
    scale = [learning_rate_scale(step, 25, 5) for step in range(26)]
    assert scale[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert scale[15] == pytest.approx(0.5)
    assert scale[25] == 0.0


def test_configuration_is_plain_data():
    assert RunConfig(**json.loads(json.dumps(asdict(CONFIG)))) == CONFIG
