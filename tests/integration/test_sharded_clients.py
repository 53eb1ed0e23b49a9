"""Accelerate's FSDP2 plugin swaps the optimizer's parameters: the pairs follow."""

import launch
import pytest
import sharded_clients
import tiny
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    return launch.ends(launch.start(sharded_clients.__file__, 2, folder), folder)


@pytest.mark.parametrize("name", sharded_clients.SCENARIOS)
def test_a_prepared_optimizer_trains_the_sharded_pairs(found, name):
    first, second = (end[name] for end in found)
    assert first["engaged"] == second["engaged"] == 14
    assert first["steps"] == (3 if name == "accumulation" else 6)
    assert first["warnings"] == second["warnings"] == []
    for key, weight in first["weights"][0].items():
        assert torch.equal(weight, second["weights"][0][key])


@pytest.mark.parametrize("name", ["Accelerate", "factory"])
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
    for key, weight in tiny.weights(model).items():
        other = found[0]["Accelerate"]["weights"][0][key]
        assert (other - weight).abs().max() < 2e-2 * weight.abs().max(), key
