"""A resumed run goes on bit for bit, at every size and in every mode, also after the pairs were cut."""

import copy
import random

import layered
import pytest
import torch

MODES = ["spectral", "steer", "eigenbasis", "balanced", "inverse", "none"]
FISHERS = ["kfac", "diagonal", "block_diagonal", "ekfac"]
UNUSED = {("eigenbasis", "diagonal"), ("eigenbasis", "ekfac")} | {("balanced", f) for f in FISHERS[1:]}
INVERTING = [(mode, fisher) for mode in ("inverse", "steer") for fisher in ("kfac", "block_diagonal")]
WAYS = [(mode, fisher) for mode in MODES for fisher in FISHERS if (mode, fisher) not in UNUSED]


def through_a_file(tmp_path, *parts):
    torch.save([part.state_dict() for part in parts], tmp_path / "run.pt")
    return torch.load(tmp_path / "run.pt", weights_only=True)


def resumed(tmp_path, model, optimizer, fresh_model, options):
    weights, state = through_a_file(tmp_path, model, optimizer)
    fresh = layered.grit(fresh_model, **options)
    fresh_model.load_state_dict(weights)
    fresh.load_state_dict(state)
    return fresh


def drawn(seed):
    """A size and a way, every other one with operators that are inverses, which a refresh leaves for long."""
    chance = random.Random(seed)
    size = {name: chance.randint(1, 40) for name in ("d_in", "d_out")}
    size |= {"width": chance.randint(2, 40), "rank": chance.randint(1, 16), "sites": chance.randint(1, 3)}
    way = chance.choice(INVERTING if seed % 2 else WAYS)
    return size, way, chance.randint(1, 4), chance.randint(1, 5)


@pytest.mark.parametrize("part", range(4))
def test_at_every_size(tmp_path, part):
    for seed in range(10 * part, 10 * part + 10):
        size, (mode, fisher), frequency, steps = drawn(seed)
        options = {"precondition": mode, "fisher": fisher, "kfac_update_freq": frequency}
        model = layered.model(**size)
        optimizer = layered.grit(model, **options)
        layered.train(model, optimizer, steps)
        twin = layered.model(**size, seed=1)
        other = resumed(tmp_path, model, optimizer, twin, options)
        assert layered.same(other.state_dict(), optimizer.state_dict()), (size, options, steps)
        for m, o in ((model, optimizer), (twin, other)):
            layered.train(m, o, 3, first=steps)
        assert layered.same(layered.weights(model), layered.weights(twin)), (size, options, steps)


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_the_first_step_may_come_without_a_backward_pass(tmp_path, way, frequency):
    """The gradients are set by hand, and no tap has fired: what is in force has to be there."""
    options = {"precondition": way[0], "fisher": way[1], "kfac_update_freq": frequency}
    model, twin = layered.model(), layered.model(seed=1)
    optimizer = layered.grit(model, **options)
    layered.train(model, optimizer, 5)
    other = resumed(tmp_path, model, optimizer, twin, options)
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        for i, p in enumerate(layered.trained(m)):
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p) * (i + 1)
        o.step()
        layered.train(m, o, 2, first=5)
    assert layered.same(layered.weights(model), layered.weights(twin))
    assert optimizer.telemetry()["refreshes"] == other.telemetry()["refreshes"]


BUDGETS = {
    "none": {},
    "parameters": {
        "reprojection": "balanced",
        "reprojection_freq": 2,
        "rank_budget": 100,
        "min_lora_rank": 0,
    },
    "share": {"reprojection": "balanced", "reprojection_freq": 2, "rank_budget": 0.55, "min_lora_rank": 2},
}
# The moments of gradients do not follow a change of coordinates.
CUT = [(*way, budget) for way in WAYS for budget in BUDGETS if way[1] == "kfac" or budget == "none"]


def give_up_trailing(model):
    """Weights from elsewhere, in which two pairs use fewer directions."""
    with torch.no_grad():
        for layer, rank in ((model.base_model.model.first, 2), (model.base_model.model.third, 1)):
            layer.lora_A["default"].weight[rank:] = 0
            layer.lora_B["default"].weight[:, rank:] = 0


@pytest.mark.parametrize(("mode", "fisher", "budget"), CUT, ids=["-".join(case) for case in CUT])
def test_after_a_cut(tmp_path, mode, fisher, budget):
    """Build anew on the smaller adapter, with the options of before, and load."""
    options = {"precondition": mode, "fisher": fisher, "kfac_update_freq": 3, **BUDGETS[budget]}
    model = layered.model(rank=4)
    optimizer = layered.grit(model, **options)
    layered.train(model, optimizer, 6)
    if budget == "none":
        give_up_trailing(model)
    before = layered.answer(model)
    optimizer.shrink_()
    assert min(optimizer.ranks().values()) < 4
    assert (layered.answer(model) - before).abs().max() < 1e-6
    layered.train(model, optimizer, 1, first=6)
    twin = copy.deepcopy(model)
    other = resumed(tmp_path, model, optimizer, twin, options)
    assert other.ranks().as_dict() == optimizer.ranks().as_dict()
    for m, o in ((model, optimizer), (twin, other)):
        layered.train(m, o, 4, first=7)
    assert layered.same(layered.weights(model), layered.weights(twin))
    assert all(w.isfinite().all() for w in layered.weights(model).values())


@pytest.mark.parametrize("fisher", FISHERS[1:])
def test_with_nothing_to_cut_training_goes_on_as_it_would_have(fisher):
    options = {"precondition": "inverse", "fisher": fisher, "kfac_update_freq": 2}
    model = layered.model()
    optimizer = layered.grit(model, **options)
    layered.train(model, optimizer, 4)
    twin, other = copy.deepcopy([model, optimizer])
    optimizer.shrink_()
    for m, o in ((model, optimizer), (twin, other)):
        layered.train(m, o, 3, first=4)
    assert layered.same(layered.weights(model), layered.weights(twin))


def test_a_budget_that_only_a_larger_adapter_meets_is_refused_at_the_first_step():
    """Unless a checkpoint of the larger one is loaded before, which construction cannot know."""
    model = layered.model(rank=2)
    optimizer = layered.grit(model, reprojection="balanced", rank_budget=150, min_lora_rank=0)
    before = layered.weights(model)
    layered.loss_of(model).backward()
    with pytest.raises(ValueError, match=r"rank_budget=150 is more than the 86 .*shrink_\(\) has cut"):
        optimizer.step()
    assert layered.same(layered.weights(model), before)
