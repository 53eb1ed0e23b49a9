"""A common budget for all ranks: who gets what, how it changes, and that what is given up is gone."""

import copy
import warnings

import pytest
import support
import tiny
import torch
from budgets import BUDGET, kept_parameters, pairs_of

from grit_optim import GritOptimizer
from grit_optim.rank import budget
from grit_optim.rank.budget import BudgetSchedule

# ------------------------------------------------------------------ refused


IMPOSSIBLE = {
    "below the floor": ({"rank_budget": 0.1, "min_lora_rank": 2}, "min_lora_rank=2 keeps 992"),
    "not one direction": ({"rank_budget": 10}, "the smallest direction of any site has 32"),
    "more than there is": ({"rank_budget": 10**6}, "more than the 1,984 parameters"),
    "a start below the floor": (
        {"rank_budget": (0.1, 0.9), "rank_budget_steps": 5, "min_lora_rank": 2},
        "the start of rank_budget=0.1 is 198 of the adapter's 1,984 parameters",
    ),
    "with a threshold": ({"rank_adaptation_threshold": 0.99}, "two ways to decide the ranks"),
    "start without steps": ({"rank_budget": (0.9, 0.5)}, "no effect with rank_budget_steps=0"),
    "schedule without steps": ({"rank_budget_schedule": "cosine"}, "no effect with rank_budget_steps=0"),
    "steps without budget": ({"rank_budget": None, "rank_budget_steps": 5}, "rank_budget, which is None"),
    "schedule without budget": (
        {"rank_budget": None, "rank_budget_schedule": "cosine"},
        "rank_budget, which is None",
    ),
    "paper's projection": ({"reprojection": "two_sided"}, "needs reprojection='balanced'"),
}


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_budgets_are_refused_at_construction(options, message):
    model = tiny.llama()
    with pytest.raises(ValueError, match=message):
        tiny.grit(model, **{**BUDGET, **options})
    assert not any("Tap" in str(h) for m in model.modules() for h in m._forward_hooks.values())


# ------------------------------------------------------------------ the schedule


def test_linear_and_cosine_schedules():
    linear = BudgetSchedule(100.0, 40.0, "linear", first=10, steps=20)
    assert [float(linear.advance(step)) for step in (10, 15, 20, 30, 99)] == [100, 85, 70, 40, 40]
    cosine = BudgetSchedule(100.0, 40.0, "cosine", first=10, steps=20)
    assert [round(float(cosine.advance(step)), 3) for step in (10, 15, 20, 30)] == [100, 91.213, 70, 40]
    rising = BudgetSchedule(32.0, 96.0, "linear", first=0, steps=4)
    assert [float(rising.advance(step)) for step in (0, 2, 4)] == [32, 64, 96]
    assert float(BudgetSchedule(100.0, 40.0, "linear", 0, 0).advance(0)) == 40


def test_adaptive_schedule_stands_still_while_the_loss_suffers(monkeypatch):
    monkeypatch.setattr(budget, "TOLERANCE", 0.1)
    schedule = BudgetSchedule(100.0, 0.0, "adaptive", first=0, steps=10)
    budgets = []
    for step, losses in enumerate([[3.0], [2.0, 2.0], [2.1], [2.5], [float("nan"), 2.3], [2.15], [1.0]]):
        for loss in losses:
            schedule.observe(torch.tensor(loss))
        budgets.append(round(float(schedule.advance(step)), 6))
    #                   first, better, within 10 %, worse, worse, within 10 %, better
    assert budgets == [100, 90, 80, 80, 80, 70, 60]
    twin = BudgetSchedule(100.0, 0.0, "adaptive", first=0, steps=10)
    twin.load(copy.deepcopy(schedule.state()))
    for s in (schedule, twin):
        s.observe(1.2)
    assert float(schedule.advance(7)) == float(twin.advance(7)) == pytest.approx(60)


def _train_without_a_loss_in_the_output(model, optimizer, steps):
    for seed in range(steps):
        ids = tiny.tokens(seed)
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adaptive_schedule_that_is_told_no_loss_says_so_once_and_stands_still():
    model = tiny.llama()
    options = {**BUDGET, "rank_budget_schedule": "adaptive", "rank_budget_steps": 4}
    optimizer = tiny.grit(model, **options)
    with pytest.warns(UserWarning, match="stands still at its start, since no loss has been told") as caught:
        _train_without_a_loss_in_the_output(model, optimizer, 9)
    assert sum("stands still" in str(w.message) for w in caught) == 1
    assert set(optimizer.ranks().values()) == {4}


def test_adaptive_schedule_takes_the_loss_from_whoever_tells_it():
    reduced = []
    for told in ("by the closure", "by observe", "by the model's output"):
        model = tiny.llama()
        optimizer = tiny.grit(model, **BUDGET, rank_budget_schedule="adaptive", rank_budget_steps=4)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = tiny.loss_of(model)
            loss.backward()
            return loss

        for _ in range(9):
            if told == "by the closure":
                optimizer.step(closure)
                continue
            loss = closure()
            if told == "by observe":
                optimizer.observe(loss)
            optimizer.step()
        reduced.append(optimizer.ranks().parameters)
    assert len(set(reduced)) == 1
    assert reduced[0] <= 0.5 * optimizer.ranks().parameters_before


# ------------------------------------------------------------------ in training


class Noisy(torch.optim.SGD):
    """A base that moves every weight whatever its gradient, as Langevin dynamics does."""

    def step(self, closure=None):
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn_like(p), alpha=1e-3)
        return result


def adamw8bit(parameters):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.3, min_8bit_size=16)


BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.3),
    "muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.3),
    "noisy": lambda p: Noisy(p, lr=1e-2),
    "adamw8bit": adamw8bit,
}


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore:GritOptimizer changed the coordinates")
def test_what_a_budget_gives_up_stays_exactly_zero_under_every_base(base, mode):
    model = tiny.llama()
    optimizer = GritOptimizer(
        BASES[base](tiny.trained(model)),
        model,
        precondition=mode,
        kfac_min_samples=8,
        kfac_update_freq=3,
        **BUDGET,
    )
    tiny.train(model, optimizer, 9)
    ranks = optimizer.ranks()
    assert min(ranks.values()) == 0, "no site was given up as a whole"
    assert max(ranks.values()) > 1
    assert ranks.parameters <= 0.5 * ranks.parameters_before
    assert len(pairs_of(model)) == 14
    for (name, a, b), rank in zip(pairs_of(model), ranks.values(), strict=True):
        assert torch.count_nonzero(a[rank:]) == torch.count_nonzero(b[rank:]) == 0, name
        assert torch.count_nonzero(a[:rank]) == a[:rank].numel(), name
        assert torch.isfinite(a).all(), name
    for parameter, rank in zip(
        model_order(optimizer), (r for r in ranks.values() for _ in range(2)), strict=True
    ):
        for key, value in optimizer.state[parameter].items():
            if base not in ("adamw", "sgd") or not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            rows = value if parameter.shape[0] == 4 else value.T
            assert torch.count_nonzero(rows[rank:]) == 0, key


def model_order(optimizer):
    return [p for site in support.sites(optimizer) for p in (site.a, site.b)]


def test_the_budget_is_kept_on_the_way_and_never_overspent():
    model = tiny.llama(rank=6)
    optimizer = tiny.grit(
        model, **{**BUDGET, "rank_budget": 0.25}, rank_budget_steps=8, rank_adaptation_start_step=4
    )
    total, kept = optimizer.ranks().parameters_before, []
    for step in range(16):
        tiny.train(model, optimizer, 1, first=step)
        kept.append(optimizer.ranks().parameters / total)
    assert kept[3] == 1
    assert kept == sorted(kept, reverse=True)
    for step in range(4, 16, 2):
        allowed = 1 - 0.75 * min(1.0, (step - 4) / 8)
        assert allowed - 0.03 < kept[step] <= allowed
    assert kept_parameters(model) == optimizer.ranks().parameters


def test_a_budget_in_parameters_and_a_floor():
    model = tiny.llama()
    optimizer = tiny.grit(model, **{**BUDGET, "rank_budget": 700, "min_lora_rank": 1})
    tiny.train(model, optimizer, 4)
    ranks = optimizer.ranks()
    assert min(ranks.values()) == 1
    assert 640 < ranks.parameters <= 700


@pytest.mark.parametrize("mode", ["spectral", "eigenbasis"])
def test_a_rising_budget_brings_ranks_back_without_changing_what_the_model_computes(mode):
    """The third seed's projection_budget_start=32, projection_budget_end=96."""
    model = tiny.llama()
    options = {**BUDGET, "rank_budget": (0.3, 0.9), "rank_budget_steps": 8, "min_lora_rank": 1}
    optimizer = tiny.grit(model, precondition=mode, **options)
    kept = []
    for step in range(12):
        if step == 8:
            before, optimizer.param_groups[0]["lr"] = tiny.loss_of(model, 99), 0.0
        tiny.train(model, optimizer, 1, first=step)
        if step == 8:
            assert tiny.loss_of(model, 99).item() == pytest.approx(before.item(), abs=1e-5)
            optimizer.param_groups[0]["lr"] = 1e-2
        kept.append(optimizer.ranks().parameters / optimizer.ranks().parameters_before)
    assert kept[2] < 0.5
    assert 0.85 < kept[-1] <= 0.9
    assert all(
        torch.count_nonzero(b[:rank]) == b[:rank].numel()
        for (_, _, b), rank in zip(pairs_of(model), optimizer.ranks().values(), strict=True)
    ), "what came back is trained"


def test_regrown_rows_are_as_long_as_the_others():
    model = tiny.llama()
    options = {**BUDGET, "rank_budget": (0.5, 1.0), "rank_budget_steps": 2, "min_lora_rank": 2}
    optimizer = tiny.grit(model, **options)
    tiny.train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.0
    tiny.train(model, optimizer, 2)
    assert set(optimizer.ranks().values()) == {4}
    for name, a, b in pairs_of(model):
        norms = a.norm(dim=1)
        new = b.abs().sum(1) == 0
        if new.any():
            assert norms[new].tolist() == pytest.approx(
                [float(norms[~new].square().mean().sqrt())] * int(new.sum()), rel=1e-4
            ), name


RESUMED = {
    "linear": {"rank_budget_steps": 8},
    "adaptive": {"rank_budget_steps": 8, "rank_budget_schedule": "adaptive"},
    "regrowth": {"rank_budget": (0.3, 0.9), "rank_budget_steps": 12},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_goes_on_as_if_never_stopped(options, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "TOLERANCE", 0.0)  # so that "adaptive" does stand still now and then

    def train(model, optimizer, first, steps):
        for seed in range(first, first + steps):
            loss = tiny.loss_of(model, seed)
            loss.backward()
            optimizer.observe(loss)
            optimizer.step()
            optimizer.zero_grad()

    model = tiny.llama()
    optimizer = tiny.grit(model, **{**BUDGET, **options})
    train(model, optimizer, 0, 7)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = tiny.llama(seed=1)
    fresh = tiny.grit(other, **{**BUDGET, **options})
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    for m, o in ((model, optimizer), (other, fresh)):
        train(m, o, 7, 7)
    assert optimizer.ranks().as_dict() == fresh.ranks().as_dict()
    assert len(tiny.weights(model)) == 28
    for name, value in tiny.weights(model).items():
        assert torch.equal(value, tiny.weights(other)[name]), name


def test_without_reduction_nothing_changes_and_default_has_no_budget():
    model, other = tiny.llama(), tiny.llama()
    tiny.train(model, tiny.grit(model), 5)
    whole = tiny.grit(other, reprojection="balanced", reprojection_freq=100, rank_budget=1.0)
    tiny.train(other, whole, 5)
    assert set(whole.ranks().values()) == {4}
    for name, value in tiny.weights(model).items():
        torch.testing.assert_close(value, tiny.weights(other)[name], rtol=1e-3, atol=1e-4)


def test_a_copy_goes_on_with_the_same_budget():
    model = tiny.llama()
    optimizer = tiny.grit(model, **BUDGET, rank_budget_steps=8)
    tiny.train(model, optimizer, 5)
    both = copy.deepcopy([model, optimizer])
    for m, o in ((model, optimizer), both):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.train(m, o, 6, first=5)
    assert dict(optimizer.ranks()) == dict(both[1].ranks())
    assert optimizer.ranks().parameters <= 0.5 * optimizer.ranks().parameters_before
