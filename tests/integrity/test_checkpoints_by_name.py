"""torch.distributed.checkpoint saves and loads by the names of parameters, and GRIT's state with them."""

import contextlib
import copy
import warnings

import pairs
import pytest
import support
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

OPTIONS = {
    "spectral": {},
    "eigenbasis": {"precondition": "eigenbasis"},
    "ekfac": {"precondition": "inverse", "fisher": "ekfac"},
    "budget": {
        "precondition": "balanced",
        "kfac_update_freq": 2,
        "reprojection": "balanced",
        "reprojection_freq": 2,
        "rank_budget": 0.6,
        "rank_budget_steps": 6,
        "rank_budget_schedule": "adaptive",
    },
    "penalties": {"precondition": "inverse", "lambda_kfac": 1e-2, "adaptive_schedule": True},
    "from gradients": {"capture": "gradients", "kfac_update_freq": 3},
}
SGD = {"base": torch.optim.SGD, "settings": {"lr": 1e-2}}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(steps=6, **options):
    model = pairs.network()
    optimizer = pairs.wrapped(model, **options)
    pairs.train(model, optimizer, steps)
    return model, optimizer


def saved(model, optimizer, how=None):
    """What torch keeps, apart from the optimizer itself."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=how),
    }


def loaded(state, how=None, **options):
    """A new model and optimizer that go on from it."""
    model = pairs.network()
    optimizer = pairs.wrapped(model, **options)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=how)
    return model, optimizer


def through_files(state, folder, how=None, **options):
    """``state`` saved, and read into the state of a new optimizer."""
    dcp.save(copy.deepcopy(state), checkpoint_id=folder, no_dist=True)
    model = pairs.network()
    fresh = saved(model, pairs.wrapped(model, **options), how)
    dcp.load(fresh, checkpoint_id=folder, no_dist=True)
    return fresh


def go_on_alike(one, other, steps=4):
    for model, optimizer in (one, other):
        pairs.train(model, optimizer, steps, first=6)
    weights = zip(pairs.trained(one[0]), pairs.trained(other[0]), strict=True)
    return all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_from_files_goes_on_bit_by_bit(name, tmp_path):
    run = trained(**OPTIONS[name])
    state = through_files(saved(*run), tmp_path, **OPTIONS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = loaded(state, **OPTIONS[name])
    assert other[1].telemetry()["steps"] == 6
    assert go_on_alike(run, other)


@pytest.mark.parametrize("how", [{"flatten_optimizer_state_dict": True}, {"full_state_dict": True}], ids=str)
def test_flattened_and_full(how, tmp_path):
    options = OPTIONS["eigenbasis"]
    run, how = trained(**options), StateDictOptions(**how)
    state = through_files(saved(*run, how), tmp_path, how, **options)
    assert go_on_alike(run, loaded(state, how, **options))


@pytest.mark.parametrize("flat", [False, True])
def test_a_base_that_keeps_nothing(flat, tmp_path):
    run, how = trained(**SGD), StateDictOptions(flatten_optimizer_state_dict=flat)
    state = through_files(saved(*run, how), tmp_path, how, **SGD)
    assert go_on_alike(run, loaded(state, how, **SGD))


def test_an_optimizer_may_be_saved_itself(tmp_path):
    """DCP then asks its own state_dict, by number."""
    model, optimizer = trained(precondition="eigenbasis")
    dcp.save({"optimizer": optimizer}, checkpoint_id=tmp_path, no_dist=True)
    other = trained(steps=1, precondition="eigenbasis")
    other[0].load_state_dict(model.state_dict())
    dcp.load({"optimizer": other[1]}, checkpoint_id=tmp_path, no_dist=True)
    assert go_on_alike((model, optimizer), other)


def test_only_what_is_asked_by_name_lies_with_the_parameters():
    model, optimizer = trained()
    plain = optimizer.state_dict()
    assert "grit" in plain
    assert all("grit" not in entries for entries in plain["state"].values())
    by_name = get_optimizer_state_dict(model, optimizer)
    assert sum("grit" in entries for entries in by_name["state"].values()) == 2
    assert all("grit" not in entries for entries in optimizer.base.state.values())


def test_the_base_alone_goes_on_from_it():
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer)
    base = torch.optim.AdamW(pairs.trained(model), lr=1e-2)
    set_optimizer_state_dict(model, base, state)
    pairs.train(model, base, 1)


def test_a_state_that_is_lost_is_said():
    run = trained()
    state = saved(*run)
    for entries in state["optimizer"]["state"].values():
        entries.pop("grit", None)
    with pytest.warns(UserWarning, match=r"has no 'grit' in it, so the curvature starts anew.*eigenbasis"):
        _, optimizer = loaded(state)
    assert optimizer.telemetry()["steps"] == 0


@pytest.mark.parametrize("damage", ["pair", "record", "garbled", "entry"])
def test_a_state_that_is_lost_in_part_is_refused(damage):
    run = trained()
    state = copy.deepcopy(saved(*run))
    first, second = (e["grit"] for e in state["optimizer"]["state"].values() if "grit" in e)
    message = {
        "pair": r"1 \(.*second.default\) of this model not in it",
        "record": r"lacks grit\.record, which lies with the first pair's A",
        "garbled": r"grit\.record cannot be read",
        "entry": r"lacks 'gradient'",
    }
    if damage == "pair":
        del second["0"]
    elif damage == "record":
        del first["record"]
    elif damage == "garbled":
        first["record"][8:12] = 7
    else:
        del first["0"]["gradient"]
    model, optimizer = trained(steps=2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message[damage]):
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert str(support.parts(optimizer).state_dict()) == str(before["grit"])


def test_nothing_that_is_saved_gets_larger_with_what_is_in_the_record():
    """A checkpoint is read into the tensors of an optimizer that has done nothing yet."""
    sizes = set()
    for steps in (0, 9):
        model, optimizer = trained(steps, **OPTIONS["budget"])
        with contextlib.suppress(ValueError):
            optimizer.reduce_ranks_(0.4)
        state = get_optimizer_state_dict(model, optimizer)["state"]
        own = [entries["grit"] for entries in state.values() if "grit" in entries]
        sizes.add(tuple(entry["record"].shape for entry in own if "record" in entry))
    assert len(sizes) == 1
