"""Budgets of parts of a multimodal model, and the budget that sizes itself by effective ranks."""

import math
from copy import deepcopy

import pytest
import tiny
import torch
import vlm
from hf import assert_same
from support import parts, sites

from grit_optim import GritOptimizer, linalg

WAY = {"reprojection": "balanced", "reprojection_freq": 2, "min_lora_rank": 0, "kfac_min_samples": 2}


def grit(model, budget, **options):
    return GritOptimizer(tiny.adamw(model, 1e-3), model, rank_budget=budget, **{**WAY, **options})


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        model(**vlm.batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shares(optimizer):
    """The share of its parameters that each part keeps."""
    return {
        part: report.parameters / report.parameters_before
        for part, report in optimizer.ranks().by_modality().items()
    }


def at_most(found, wanted, slack=0.1):
    """Each share is below its budget by no more than one direction."""
    assert found.keys() == wanted.keys()
    assert all(wanted[part] - slack <= share <= wanted[part] for part, share in found.items()), found


def test_each_part_keeps_its_own_budget():
    model = vlm.adapted()
    optimizer = grit(model, {"vision": 0.5, "cross_modal": 1.0, "text": 0.6})
    train(model, optimizer, 3)
    found = shares(optimizer)
    at_most(found, {"vision": 0.5, "cross_modal": 1.0, "text": 0.6})
    train(model, optimizer, 3, first=3)
    assert shares(optimizer) == found, "a budget that is reached changes nothing more"


def test_parts_that_are_left_out_keep_all_and_numbers_count_parameters():
    model = vlm.adapted()
    optimizer = grit(model, {"vision": 600})
    train(model, optimizer, 3)
    report = optimizer.ranks().by_modality()
    assert 600 - 32 < report["vision"].parameters <= 600
    assert report["text"].parameters == report["text"].parameters_before


def test_directions_compete_within_their_part_alone():
    """A part's ranks are those of a budget of that part alone, whatever the others are given."""
    found = []
    for budget in ({"vision": 0.5}, {"vision": 0.5, "text": 0.2}):
        model = vlm.adapted()
        optimizer = grit(model, budget)
        train(model, optimizer, 2)
        found.append(dict(optimizer.ranks().by_modality()["vision"]))
    assert found[0] == found[1]
    assert len(set(found[0].values())) > 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "adaptive"])
def test_every_schedule_takes_each_part_from_its_start_to_its_end(schedule):
    model = vlm.adapted()
    optimizer = grit(
        model,
        {"vision": (1.0, 0.5), "text": (0.9, 0.4)},
        rank_budget_schedule=schedule,
        rank_budget_steps=4,
    )
    seen = []
    for first in range(0, 12, 2):
        for step in (first, first + 1):
            optimizer.observe(1.0 - 0.01 * step)  # the adaptive one goes on while the loss falls
            train(model, optimizer, 1, first=step)
        seen.append(shares(optimizer))
    for part, end in (("vision", 0.5), ("text", 0.4)):
        course = [share[part] for share in seen]
        assert course == sorted(course, reverse=True)
        assert course[0] > end + 0.1
        assert end - 0.1 <= course[-1] <= end


def test_a_part_whose_budget_rises_gets_directions_back_and_the_others_do_not():
    model = vlm.adapted()
    optimizer = grit(model, {"vision": (0.3, 0.9), "text": 0.5}, rank_budget_steps=4)
    train(model, optimizer, 2)
    before = shares(optimizer)
    train(model, optimizer, 6, first=2)
    after = shares(optimizer)
    assert before["vision"] <= 0.7
    assert 0.75 <= after["vision"] <= 0.9
    assert 0.4 <= after["text"] <= 0.5


@pytest.mark.parametrize("budget", [{"vision": (1.0, 0.4), "text": (0.9, 0.5)}, "effective"])
def test_a_resumed_run_equals_the_uninterrupted_one(budget):
    options = {"rank_budget_steps": 6, "rank_budget_schedule": "cosine"}
    model = vlm.adapted()
    optimizer = grit(model, budget, **options)
    train(model, optimizer, 3)
    state, weights = deepcopy(optimizer.state_dict()), tiny.weights(model)
    train(model, optimizer, 5, first=3)
    other = vlm.adapted()
    other.load_state_dict(weights, strict=False)
    resumed = grit(other, budget, **options)
    resumed.load_state_dict(state)
    train(other, resumed, 5, first=3)
    assert_same(other, model, matrices=56)
    assert resumed.ranks() == optimizer.ranks()


def test_a_budgets_state_of_another_form_starts_anew():
    model = vlm.adapted()
    optimizer = grit(model, {"vision": 0.5})
    train(model, optimizer, 2)
    state = deepcopy(optimizer.state_dict())
    optimizer.close()
    other = grit(model, 0.5)
    other.load_state_dict(state)
    train(model, other, 3, first=2)
    assert sum(shares(other).values()) > 0


IMPOSSIBLE = [
    (vlm.adapted, {"audio": 0.5}, "rank_budget\\['audio'\\] is a budget of the audio part, and no pair"),
    (tiny.llama, {"vision": 0.5}, "the pairs are of no modality"),
    (vlm.adapted, {"vision": 10}, "rank_budget\\['vision'\\]=10 is 10 of the adapter's"),
    (vlm.adapted, {"vision": 10**6}, "rank_budget\\['vision'\\]=1000000 is more than the 1,280 parameters"),
    (vlm.adapted, {"vision": (0.9, 0.5)}, "no effect with rank_budget_steps=0"),
]


@pytest.mark.parametrize(("make", "budget", "message"), IMPOSSIBLE)
def test_budgets_that_cannot_be_met_are_refused_at_construction(make, budget, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        grit(model, budget)
    assert not any("Tap" in str(h) for m in model.modules() for h in m._forward_hooks.values())


# -------------------------------------------------------------------- the budget that sizes itself


def twin(optimizer, factor):
    """⌈factor · exp(entropy of Σ_a's eigenvalues)⌉ by site, in float64."""
    found = {}
    for curvature in optimizer.curvature:
        for name, matrix in zip(curvature.bucket.names(), curvature.factors.activation, strict=True):
            p = torch.linalg.eigvalsh(matrix.double()).clamp_min(0)
            p = p / p.sum()
            entropy = -torch.special.xlogy(p, p).sum()
            found[name] = min(curvature.bucket.rank, math.ceil(factor * float(entropy.exp())))
    return found


@pytest.mark.parametrize("factor", [1.2, 0.6])
def test_each_pair_comes_to_its_effective_rank_times_the_factor(factor):
    model = vlm.adapted()
    way = {"min_lora_rank": 1, "reprojection_freq": 3, "reprojection_warmup_steps": 2}
    optimizer = grit(model, "effective", effective_rank_factor=factor, **way)
    train(model, optimizer, 3)
    plan = optimizer.plan_ranks("effective")
    assert plan == twin(optimizer, factor)
    train(model, optimizer, 1, first=3)
    sizes = parts(optimizer).ranks.budget.sizes
    assert optimizer.ranks() == {name: min(4, size) for name, size in sizes.items()}
    assert len(set(optimizer.ranks().values())) > 1
    kept = dict(optimizer.ranks())
    train(model, optimizer, 3, first=4)
    assert optimizer.ranks() == kept, "it is measured once: in balanced coordinates Σ_a is another"


def test_a_factor_of_low_rank_gives_a_rank_as_low():
    model = tiny.llama(rank=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter[1:] = 1e-3 * parameter[1:]
    optimizer = tiny.grit(model, **{**WAY, "rank_budget": "effective", "min_lora_rank": 1}, lr=1e-6)
    tiny.train(model, optimizer, 3)
    assert set(optimizer.ranks().values()) == {2}, "1.2 directions, rounded up"


def test_the_way_to_the_effective_ranks_has_a_schedule_too():
    model = vlm.adapted()
    optimizer = grit(model, "effective", effective_rank_factor=0.5, rank_budget_steps=4, min_lora_rank=1)
    seen = []
    for first in range(0, 8, 2):
        train(model, optimizer, 2, first=first)
        seen.append(sum(optimizer.ranks().values()))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1]
    sizes = parts(optimizer).ranks.budget.sizes
    assert optimizer.ranks() == {name: min(4, size) for name, size in sizes.items()}


def test_plans_take_what_budgets_take():
    model = vlm.adapted()
    optimizer = grit(model, None)
    train(model, optimizer, 2)
    plan = optimizer.plan_ranks({"vision": 0.5, "text": 0.6}).by_modality()
    assert plan["vision"].parameters <= 0.5 * plan["vision"].parameters_before
    assert plan["cross_modal"].parameters == plan["cross_modal"].parameters_before
    with pytest.raises(ValueError, match="no pair of that part is trained"):
        optimizer.plan_ranks({"audio": 0.5})
    with pytest.raises(TypeError, match="did you mean 'effective'"):
        optimizer.plan_ranks("efective")
    assert optimizer.reduce_ranks_("effective") == twin_before(optimizer)


def twin_before(optimizer):
    """Ranks after a cut are the plan's; read from what is left of A."""
    found = {}
    for site in sites(optimizer):
        found[site.name] = int((site.a.detach().abs().sum(1) > 0).sum())
    return found


def test_effective_rank_is_that_of_the_algebra():
    values = torch.tensor([[4.0, 2.0, 1.0, 1.0]])
    p = values / values.sum()
    assert float(linalg.effective_rank(values)) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
