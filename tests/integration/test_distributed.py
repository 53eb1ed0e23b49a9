"""Processes that train together (DDP) take one another's steps to the bit, as one process with all rows."""

import data_parallel
import launch
import pytest
import support
import tiny
import torch

PROCESSES = 2


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Every scenario's end in each of two processes, and in one that has all rows."""
    folder = tmp_path_factory.mktemp("together")
    started = launch.start(data_parallel.__file__, PROCESSES, folder)
    try:
        alone = data_parallel.run(0, 1)
    finally:
        found = launch.ends(started, folder)
    return found, alone


@pytest.mark.parametrize("name", data_parallel.SCENARIOS)
def test_the_processes_stay_the_same_to_the_bit(ends, name):
    """Weights, moments, factors and ranks."""
    first, *others = (end[name] for end in ends[0])
    assert len(first["weights"]) >= 4
    for other in others:
        assert other["ranks"] == first["ranks"]
        assert other["told"] == pytest.approx(first["told"], rel=0, abs=0, nan_ok=True)
        for mine, its in zip(
            launch.tensors([first["weights"], first["state"]]),
            launch.tensors([other["weights"], other["state"]]),
            strict=True,
        ):
            assert torch.equal(mine, its)


@pytest.mark.parametrize(
    "name", [n for n in data_parallel.SCENARIOS if n not in ("overflow", "resting", "around")]
)
def test_together_they_are_one_process_with_all_rows(ends, name):
    both, alone = ends[0][0][name], ends[1][name]
    largest = max(product.abs().max() for product in alone["products"].values())
    assert largest > 0.01
    for key, product in alone["products"].items():
        assert (both["products"][key] - product).abs().max() < 1e-5 * largest, key
    assert both["ranks"] == alone["ranks"]
    assert both["told"] == pytest.approx(alone["told"], rel=1e-4)
    assert both["in force"] == pytest.approx(alone["in force"], rel=1e-4)


def test_the_scenarios_do_what_they_are_for(ends):
    alone = ends[1]
    for name in ("budget", "adaptive budget", "regrowth"):
        assert min(alone[name]["ranks"].values()) < 4, name
        assert alone[name]["told"]["predicted_cost"] > 0, name
    assert sum(alone["regrowth"]["ranks"].values()) > 10 * 4 * 0.4
    adapted = alone["adaptive schedule"]["in force"]
    assert adapted["kfac_update_freq"] != 4
    assert adapted["kfac_damping"] != alone["inverse"]["in force"]["kfac_damping"]


def test_an_overflow_of_one_is_dropped_by_all(ends):
    for end in ends[0]:
        assert (end["overflow"]["told"]["folds"], end["overflow"]["told"]["dropped_folds"]) == (6, 1)
        assert all(t.isfinite().all() for t in launch.tensors(end["overflow"]["weights"]))


def test_a_step_that_nobody_prepared_advances_nothing(ends):
    for end in ends[0]:
        assert end["resting"]["told"] == end["resting"]["before"]
        assert end["resting"]["told"]["steps"] == 3


@pytest.mark.parametrize("name", data_parallel.SCENARIOS)
def test_the_first_steps_find_the_sites_that_no_tap_sees_and_no_others(ends, name):
    """Compared are the tokens of all processes with the averaged gradients."""
    for end in ends[0]:
        assert end[name]["warnings"] == []
        assert end[name]["told"]["sites_by_gradients"] == {"around": 1, "from gradients": 10}.get(name, 0)


def test_the_taps_are_found_to_agree_over_all_processes(ends):
    """So that comparing ends early, as in one process; it would go on through five steps otherwise."""
    for end in [*ends[0], ends[1]]:
        assert end["resting"]["steps that are still compared"] == 0
        assert end["resting"]["told"]["steps"] == 3


def test_weights_that_were_partitioned_since_are_refused():
    """What FSDP1 with use_orig_params makes of a parameter that the optimizer holds."""
    model = tiny.llama()
    optimizer = tiny.grit(model)
    tiny.loss_of(model).backward()
    site = support.sites(optimizer)[3]
    site.a.data = site.a.data.flatten()[:7]
    with pytest.raises(
        NotImplementedError, match=r"site .*o_proj.default' is a flat vector of 7 entries: FSDP1 or ZeRO-3"
    ):
        optimizer.step()
