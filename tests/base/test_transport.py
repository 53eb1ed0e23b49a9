"""The base's second moments after a change of coordinates, against those of the changed gradients."""

import pytest
import tiny
import torch

from grit_optim import GritOptimizer
from grit_optim.base import transport
from grit_optim.rank.coordinates import change_of_coordinates


def random_move(sites, rank, keep, seed=0):
    transform = torch.randn(
        sites, rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    mask = torch.arange(rank).expand(sites, rank) < keep
    return change_of_coordinates(transform, torch.linalg.inv(transform), mask)


def operator_of(move, side, site):
    """What multiplies the gradient on its rank side, as a matrix from the left."""
    return (move.a_gradient if side == "A" else move.b_gradient.mT)[site]


def with_separable_moments(seed=1):
    """Second moments ``S_kk c_j²``: those of gradients with covariance S over the rank in every column."""
    model = tiny.llama()
    optimizer = GritOptimizer(torch.optim.AdamW(tiny.trained(model)), model, precondition="none")
    tiny.train(model, optimizer, 1)
    random = torch.Generator().manual_seed(seed)
    for curvature in optimizer.curvature:
        sites, rank = len(curvature.bucket.sites), curvature.bucket.rank
        roots = torch.randn(2, sites, rank, rank, generator=random)
        covariances = roots @ roots.mT
        scales = {}
        for group in curvature.bucket.groups:
            covariance = covariances[0 if group.side == "A" else 1]
            for index, p in zip(group.index.tolist(), group.parameters, strict=True):
                scale = torch.rand(p.flatten(1).shape[2 - group.rank_dim], generator=random)
                outer = covariance[index].diagonal()[:, None] * scale
                optimizer.state[p]["exp_avg_sq"] = (outer if group.side == "A" else outer.T).clone()
                scales[p] = scale
        yield optimizer, curvature, covariances, scales


@pytest.mark.parametrize("keep", [4, 2])
def test_second_moments_are_exact_where_all_columns_are_correlated_alike(keep):
    checked = 0
    for optimizer, curvature, covariances, scales in with_separable_moments():
        move = random_move(len(curvature.bucket.sites), curvature.bucket.rank, keep)
        transport.move_state(optimizer.base, curvature.bucket.groups, move, (covariances[0], covariances[1]))
        for group in curvature.bucket.groups:
            for index, p in zip(group.index.tolist(), group.parameters, strict=True):
                turn = operator_of(move, group.side, index)
                covariance = covariances[0 if group.side == "A" else 1][index].double()
                wanted = (turn @ covariance @ turn.T).diagonal()[:, None] * scales[p]
                moved = optimizer.state[p]["exp_avg_sq"]
                moved = moved if group.side == "A" else moved.T
                torch.testing.assert_close(moved.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.max().item())
                assert torch.count_nonzero(moved[keep:]) == 0
                checked += 1
    assert checked == 28


def test_without_known_correlations_entries_count_as_uncorrelated():
    moved = []
    for known in (False, True):
        [(optimizer, curvature, covariances, _)] = list(with_separable_moments())[:1]
        move = random_move(len(curvature.bucket.sites), curvature.bucket.rank, 4)
        unknown = torch.zeros_like(covariances[0])
        transport.move_state(
            optimizer.base, curvature.bucket.groups, move, (unknown, unknown) if known else None
        )
        moved.append(
            [optimizer.state[p]["exp_avg_sq"] for g in curvature.bucket.groups for p in g.parameters]
        )
    for one, other in zip(*moved, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def errors_of_carried_moments(monkeypatch, correlated):
    """Per move, the median relative error of AdamW's second moments in the new coordinates.

    The truth is made of all past gradients in these coordinates.
    """
    past, errors = {}, []
    carry = transport.move_state

    def remember(optimizer, args, kwargs):
        """The gradients that count are those that the base sees, in its coordinates."""
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            past.setdefault(p, []).append(p.grad.clone())

    def move_state(base, groups, move, covariances=None):
        carry(base, groups, move, covariances if correlated else None)
        for group in groups:
            for index, p in zip(group.index.tolist(), group.parameters, strict=True):
                turn = operator_of(move, group.side, index).float()
                past[p] = [turn @ g if group.side == "A" else g @ turn.T for g in past.get(p, [])]
                if not past[p]:
                    continue  # refreshed before the first step
                exact = sum(0.001 * 0.999**age * g.square() for age, g in enumerate(reversed(past[p])))
                errors.append((optimizer.state[p]["exp_avg_sq"] - exact).norm() / exact.norm())

    model = tiny.llama()
    base = torch.optim.AdamW(tiny.trained(model), lr=1e-2)
    optimizer = GritOptimizer(base, model, precondition="balanced", kfac_min_samples=8, kfac_update_freq=8)
    handle = base.register_step_post_hook(remember)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(transport, "move_state", move_state)
            tiny.train(model, optimizer, 33)
    finally:
        handle.remove()
    assert len(errors) == 4 * 28
    return torch.stack(errors).view(4, 28).median(1).values


def test_the_tokens_correlations_bring_carried_moments_nearer_to_the_gradients(monkeypatch):
    uncorrelated = errors_of_carried_moments(monkeypatch, correlated=False)
    correlated = errors_of_carried_moments(monkeypatch, correlated=True)
    assert (correlated[:3] < uncorrelated[:3]).all(), "later moves are small ones"
    assert correlated[0] < 0.85 * uncorrelated[0]


def test_copies_of_weights_are_set_where_there_are_any():
    """A schedule-free base has none of a parameter that it has not stepped yet."""
    model = tiny.llama(layers=1, target_modules=["q_proj", "v_proj"])
    optimizer = GritOptimizer(torch.optim.AdamW(tiny.trained(model)), model, precondition="none")
    (bucket,) = [curvature.bucket for curvature in optimizer.curvature]
    group = next(g for g in bucket.groups if g.side == "B")
    first, second = group.parameters[0], group.parameters[-1]
    optimizer.param_groups[0]["weight_sum"] = 0.0
    optimizer.base.state[second]["z"] = torch.ones_like(second)
    new = torch.full((len(group.parameters), group.width, bucket.rank), 2.0)
    transport.set_weights(optimizer.base, group, new, torch.tensor([[True, False, False, True]] * 2))
    assert (first == 2).all()
    expected = torch.tensor([2.0, 1.0, 1.0, 2.0]).expand(group.width, 4)
    torch.testing.assert_close(optimizer.state[second]["z"], expected)
