"""Under a budget the directions that stay move further, so that an adapter still learns as much per step."""

import copy

import pytest
import support
import tiny
from budgets import BUDGET

from grit_optim.preconditioners.spectral import Spectral
from grit_optim.preconditioners.steer import Steer


def as_it_is(model, optimizer):
    return model, optimizer


def shrunk(model, optimizer):
    optimizer.shrink_()
    return model, optimizer


def copied(model, optimizer):
    return copy.deepcopy([model, optimizer])


def resumed(model, optimizer):
    other = tiny.llama(seed=1)
    fresh = tiny.grit(other, **BUDGET)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    return other, fresh


def shrunk_and_resumed(model, optimizer):
    optimizer.shrink_()
    again = tiny.grit(model, **BUDGET)
    again.load_state_dict(optimizer.state_dict())
    return model, again


@pytest.mark.parametrize("change", [as_it_is, shrunk, copied, resumed, shrunk_and_resumed])
def test_under_a_budget_the_singular_values_of_a_step_add_up_to_what_they_did(monkeypatch, change):
    """What is left moves by first rank / rank more; a rank given up by hand takes its share along."""
    monkeypatch.setattr(Spectral, "completed", Steer.completed)
    model = tiny.llama()
    optimizer = tiny.grit(model, **BUDGET)
    tiny.train(model, optimizer, 3)
    by_hand = tiny.grit(other := tiny.llama())
    tiny.train(other, by_hand, 3)
    by_hand.reduce_ranks_({name: rank for name, rank in optimizer.ranks().items() if rank})
    for m, o, first_rank in ((*change(model, optimizer), 4), (other, by_hand, None)):
        before, rates = tiny.weights(m), {"lora_A": 0.9, "lora_B": 0.6}
        assert len(set(o.ranks().values())) > 1
        tiny.train(m, o, 1, first=3)  # the fourth step, at which no reprojection is due
        checked = 0
        for site in support.sites(o):
            rank = o.ranks()[site.name]
            for p, width, kind in ((site.a, site.a.shape[1], "lora_A"), (site.b, site.b.shape[0], "lora_B")):
                name = next(n for n, q in m.named_parameters() if q is p)
                moved = (p.detach() - before[name]).norm().item()
                if rank:
                    growth = (first_rank or rank) / rank
                    expected = o.param_groups[0]["lr"] * rates[kind] * growth * (rank * width) ** 0.5
                    assert moved == pytest.approx(expected, rel=1e-3), name
                    checked += 1
        assert checked > 10
