"""FSDP2 by way of Accelerate and the Trainer, which swap the optimizer's parameters; and under QLoRA."""

import launch
import pytest
import sharded_clients
import tiny
import torch

STEPS = {"accumulation": 3, "NF4": 4, "NF4 left whole": 4}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    return launch.ends(launch.start(sharded_clients.__file__, 2, folder), folder)


def check_as_one(weights, alone):
    assert len(alone) == 28
    for key, weight in alone.items():
        assert (weights[key] - weight).abs().max() < 2e-2 * weight.abs().max(), key


@pytest.mark.parametrize("name", sharded_clients.SCENARIOS)
def test_a_prepared_optimizer_trains_the_sharded_pairs(found, name):
    first, second = (end[name] for end in found)
    assert first["engaged"] == second["engaged"] == 14
    assert first["steps"] == STEPS.get(name, 6)
    assert first["warnings"] == second["warnings"] == []
    for key, weight in first["weights"][0].items():
        assert torch.equal(weight, second["weights"][0][key])


@pytest.mark.parametrize("name", [name for name in sharded_clients.SCENARIOS if name not in STEPS])
def test_a_saved_state_resumes_to_the_bit(found, name):
    for end in found:
        through, resumed = end[name]["weights"]
        assert len(through) == 28
        assert all(torch.equal(through[key], resumed[key]) for key in through)


def test_they_are_one_process_with_all_rows(found):
    model = tiny.llama()
    optimizer = tiny.grit(model)
    for seed in range(6):
        tiny.loss_of(model, seed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    check_as_one(found[0]["Accelerate"]["weights"][0], tiny.weights(model))


@pytest.mark.skipif(not sharded_clients.hf.HANDS_OVER_THE_MODEL, reason="transformers before 5.2")
def test_the_trainers_fsdp_is_one_process_with_all_rows(found, tmp_path):
    alone = sharded_clients.trainer(0, 1, tmp_path)
    check_as_one(found[0]["Trainer"]["weights"][0], alone["weights"][0])


@pytest.mark.parametrize("name", [name for name in sharded_clients.SCENARIOS if name.startswith("NF4")])
def test_qlora_is_one_process_with_all_rows(found, tmp_path, name):
    alone = sharded_clients.nf4(0, 1, tmp_path)
    check_as_one(found[0][name]["weights"][0], alone["weights"][0])
