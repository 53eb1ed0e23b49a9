"""Reprojection and dynamic rank, on models and on the formulas."""

import pytest
import tiny
import torch

from grit_optim import GritOptimizer, presets
from grit_optim.curvature.factors import Factors
from grit_optim.rank.projections import paper_projection
from grit_optim.rank.selection import RankPolicy

BALANCED = {"reprojection": "balanced", "reprojection_freq": 4}


def products(model):
    """ΔW of each site, by the name of A."""
    state = dict(model.named_parameters())
    return {
        n: (state[n.replace("lora_A", "lora_B")] @ p).detach().clone()
        for n, p in state.items()
        if "lora_A" in n
    }


def without_training(model, optimizer):
    """Steps that reproject but do not train: the rate is zero."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0


def known_factors(samples_g=100.0):
    """Two sites whose leading eigenvectors differ between Σ_a and Σ_g."""
    factors = Factors.zeros(2, 3, torch.device("cpu"))
    factors.activation = torch.diag(torch.tensor([1.0, 5.0, 3.0])).repeat(2, 1, 1)
    factors.gradient = torch.diag(torch.tensor([7.0, 1.0, 2.0])).repeat(2, 1, 1)
    factors.activation_samples = torch.tensor([100.0, 0.0])
    factors.gradient_samples = torch.tensor([samples_g, 0.0])
    return factors


@pytest.mark.parametrize(
    ("two_sided", "samples_g", "onto_b"),
    [(True, 100.0, [1, 0, 1]), (True, 0.0, [0, 1, 1]), (False, 100.0, [0, 1, 1])],
    ids=["two-sided", "two-sided without samples of g", "one-sided"],
)
def test_paper_projection_uses_the_leading_eigenvectors(two_sided, samples_g, onto_b):
    policy = RankPolicy(fixed=2, threshold=None, floor=1)
    factors = known_factors(samples_g)
    move, new_rank = paper_projection(factors, torch.tensor([3, 3]), policy, factors.ready(64), two_sided)
    torch.testing.assert_close(move.a_weight[0], torch.diag(torch.tensor([0.0, 1.0, 1.0])))
    torch.testing.assert_close(move.b_weight[0], torch.diag(torch.tensor(onto_b).float()))
    assert torch.equal(move.a_weight[1], torch.eye(3)), "a site without samples is left alone"
    assert torch.equal(move.b_weight[1], torch.eye(3))
    assert new_rank.tolist() == [2, 3]


@pytest.mark.parametrize("kind", ["two_sided", "one_sided", "balanced"])
def test_full_rank_reprojection_leaves_the_product(kind):
    model = tiny.llama()
    optimizer = tiny.grit(model, precondition="none", reprojection=kind, reprojection_freq=4)
    tiny.train(model, optimizer, 4)
    before = products(model)
    without_training(model, optimizer)
    tiny.train(model, optimizer, 1)
    assert optimizer.telemetry()["reprojections"] == 2
    assert len(before) == 14
    for name, product in products(model).items():
        torch.testing.assert_close(
            product, before[name], rtol=1e-4, atol=1e-5 * before[name].abs().max().item()
        )


@pytest.mark.parametrize("kind", ["two_sided", "one_sided"])
def test_paper_reprojection_leaves_rank_k_and_ranks_says_so(kind):
    model = tiny.llama()
    optimizer = tiny.grit(model, reprojection=kind, reprojection_freq=4, reprojection_k=2)
    tiny.train(model, optimizer, 5)
    assert set(optimizer.ranks().values()) == {2}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            singular = torch.linalg.svdvals(parameter.detach())
            assert singular[2] < 1e-4 * singular[0], name


def test_two_sided_and_one_sided_differ():
    after = []
    for kind in ("two_sided", "one_sided"):
        model = tiny.llama()
        tiny.train(model, tiny.grit(model, reprojection=kind, reprojection_freq=4, reprojection_k=2), 5)
        after.append(products(model))
    relative = [(after[0][n] - after[1][n]).norm() / after[0][n].norm() for n in after[0]]
    assert min(relative) > 0.05


BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.3),
}


@pytest.mark.parametrize("mode", ["spectral", "steer", "inverse", "eigenbasis", "balanced", "none"])
@pytest.mark.parametrize("base", BASES)
def test_what_balanced_reprojection_drops_stays_exactly_zero(base, mode):
    """No masking: gradients and moments of a dropped coordinate are zero, so that no base brings it back."""
    model = tiny.llama()
    optimizer = GritOptimizer(
        BASES[base](tiny.trained(model)),
        model,
        precondition=mode,
        kfac_min_samples=8,
        kfac_update_freq=3,
        reprojection_k=2,
        **BALANCED,
    )
    tiny.train(model, optimizer, 11)
    assert set(optimizer.ranks().values()) == {2}
    rows = [(n, p.flatten(1) if "lora_A" in n else p.T) for n, p in model.named_parameters() if "lora_" in n]
    assert len(rows) == 28
    for name, matrix in rows:
        assert torch.count_nonzero(matrix[2:]) == 0, name
        assert torch.count_nonzero(matrix[:2]) == matrix[:2].numel(), name


def test_balanced_reprojection_predicts_its_cost_and_costs_less_than_the_papers():
    """Without training in between, the loss rises less than by the paper's projections to the same rank."""
    rises = {}
    for kind in ("balanced", "one_sided", "two_sided"):
        model = tiny.llama(rank=6)
        optimizer = tiny.grit(
            model,
            precondition="none",
            fisher_decay=None,
            reprojection=kind,
            reprojection_k=3,
            reprojection_freq=40,
        )
        tiny.train(model, optimizer, 40)
        without_training(model, optimizer)
        before = torch.stack([tiny.loss_of(model, s) for s in range(40)]).mean().item()
        tiny.train(model, optimizer, 1)
        after = torch.stack([tiny.loss_of(model, s) for s in range(40)]).mean().item()
        rises[kind] = after - before
        if kind == "balanced":
            assert optimizer.telemetry()["predicted_cost"] > 0
    assert rises["balanced"] < min(rises["one_sided"], rises["two_sided"])


def test_rank_adaptation_starts_when_told_and_keeps_the_floor():
    model = tiny.llama(rank=6)
    optimizer = tiny.grit(
        model,
        rank_adaptation_threshold=0.3,
        min_lora_rank=2,
        rank_adaptation_start_step=6,
        **BALANCED,
    )
    tiny.train(model, optimizer, 6)
    assert set(optimizer.ranks().values()) == {6}
    tiny.train(model, optimizer, 4)
    ranks = optimizer.ranks()
    assert len(ranks) == 14
    assert min(ranks.values()) == 2
    lowest = dict(ranks)
    tiny.train(model, optimizer, 8)
    assert all(optimizer.ranks()[name] <= lowest[name] for name in lowest)


def test_reprojection_waits_for_warm_up_and_samples():
    model = tiny.llama()
    options = {"reprojection_k": 2, "reprojection_warmup_steps": 6, **BALANCED}
    optimizer = tiny.grit(model, **options)
    tiny.train(model, optimizer, 6)
    assert set(optimizer.ranks().values()) == {4}
    tiny.train(model, optimizer, 3)
    assert set(optimizer.ranks().values()) == {2}
    model = tiny.llama()
    optimizer = tiny.grit(model, **{**options, "kfac_min_samples": 10**6})
    before = tiny.train(model, optimizer, 12)
    assert set(optimizer.ranks().values()) == {4}
    assert len(before) == 12


def test_unknown_state_is_named_and_reset():
    model = tiny.llama()
    base = torch.optim.Adafactor(tiny.trained(model), lr=1e-2)
    optimizer = GritOptimizer(base, model, kfac_min_samples=8, reprojection_k=2, **BALANCED)
    with pytest.warns(UserWarning, match="Adafactor keeps state.*row_var"):
        tiny.train(model, optimizer, 5)
    assert all("row_var" not in base.state.get(p, {}) for p in tiny.trained(model))
    tiny.train(model, optimizer, 1)
    assert all("row_var" in base.state[p] for p in tiny.trained(model))


def test_paper_preset_reduces_ranks_end_to_end():
    model = tiny.llama(rank=8)
    options = {**presets.PAPER, "reprojection_freq": 5, "kfac_update_freq": 5, "cov_update_freq": 2}
    optimizer = GritOptimizer(tiny.adamw(model), model, **options)
    tiny.train(model, optimizer, 12)
    ranks = optimizer.ranks()
    assert len(ranks) == 14
    assert 4 <= min(ranks.values()) < 8
    telemetry = optimizer.telemetry()
    assert (telemetry["refreshes"], telemetry["reprojections"], telemetry["folds"]) == (3, 3, 7)
    assert telemetry["engaged_sites"] == 14
