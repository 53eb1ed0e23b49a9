"""How many directions a pair keeps: by its own spectrum, and in competition for a common budget."""

import pytest
import torch

from grit_optim.rank.selection import Bids, RankPolicy, continued, rank_for_energy, ranks_within


@pytest.mark.parametrize(
    ("spectrum", "threshold", "k"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.4, 1),
        ([4.0, 3.0, 2.0, 1.0], 0.41, 2),
        ([4.0, 3.0, 2.0, 1.0], 0.9, 3),
        ([4.0, 3.0, 2.0, 1.0], 1.0, 4),
        ([4.0, 3.0, 0.0, 0.0], 1.0, 2),
        ([0.0, 0.0, 0.0, 0.0], 0.5, 4),
    ],
)
def test_rank_for_energy(spectrum, threshold, k):
    assert rank_for_energy(torch.tensor([spectrum]), threshold).tolist() == [k]


def test_rank_policy_never_raises_a_rank_and_respects_floor_and_gate():
    spectrum = torch.tensor([[9.0, 0.5, 0.5, 0.0]]).expand(4, 4)
    current = torch.tensor([4, 1, 4, 3])
    allowed = torch.tensor([True, True, False, True])
    adaptive = RankPolicy(fixed=3, threshold=0.5, floor=2)
    assert adaptive.next_rank(spectrum, current, allowed).tolist() == [2, 1, 4, 2]
    fixed = RankPolicy(fixed=3, threshold=None, floor=2)
    assert fixed.next_rank(spectrum, current, allowed).tolist() == [3, 1, 4, 3]
    keep = RankPolicy(fixed=None, threshold=None, floor=2)
    assert torch.equal(keep.next_rank(spectrum, current, allowed), current)


def twin_ranks(bids, budget, floor):
    """One loop over all directions, the dearest per parameter first; equal ones in the order of the sites."""
    entries, ranks, spent = [], {}, 0.0
    for b, bid in enumerate(bids):
        for s in range(len(bid.size)):
            current = int(bid.current[s])
            must = min(floor, current) if bid.allowed[s] else current
            ranks[b, s] = 0
            for i in range(current):
                priority = float("inf") if i < must else float(bid.loss[s, i].double() / bid.size[s])
                entries.append((-priority, b, s, i, int(bid.size[s])))
    for _, b, s, _, size in sorted(entries, key=lambda e: e[0]):
        spent += size
        ranks[b, s] += spent <= budget
    for (b, s), rank in ranks.items():
        current = int(bids[b].current[s])
        ranks[b, s] = max(rank, min(floor, current) if bids[b].allowed[s] else current)
    return ranks


def random_bids(seed):
    generator = torch.Generator().manual_seed(seed)
    bids = []
    for sites, rank in ((3, 4), (2, 6)):
        loss = torch.rand(sites, rank, generator=generator).sort(-1, descending=True).values
        current = torch.randint(1, rank + 1, (sites,), generator=generator)
        loss = loss * (torch.arange(rank) < current[:, None])
        size = torch.randint(5, 50, (sites,), generator=generator)
        allowed = torch.rand(sites, generator=generator) < 0.8
        bids.append(Bids(loss, size, current, allowed))
    return bids


@pytest.mark.parametrize("floor", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_sort_agrees_with_a_loop(seed, floor):
    bids = random_bids(seed)
    total = sum(int((b.size * b.current).sum()) for b in bids)
    for share in (0.1, 0.4, 0.7, 1.0):
        ranks = ranks_within(bids, torch.tensor(share * total, dtype=torch.float64), floor)
        expected = twin_ranks(bids, share * total, floor)
        assert [r.tolist() for r in ranks] == [
            [expected[b, s] for s in range(len(bid.size))] for b, bid in enumerate(bids)
        ]
    assert all(torch.equal(r, b.current) for r, b in zip(ranks, bids, strict=True)), (
        "all of it fits into all of it"
    )


def test_the_budget_goes_to_the_directions_whose_loss_per_parameter_is_highest():
    loss = torch.tensor([[9.0, 1.0], [8.0, 7.0]])
    bids = [Bids(loss, torch.tensor([10, 10]), torch.tensor([2, 2]), torch.tensor([True, True]))]
    assert ranks_within(bids, torch.tensor(30.0), 0)[0].tolist() == [1, 2]
    dear = [Bids(loss, torch.tensor([10, 100]), torch.tensor([2, 2]), torch.tensor([True, True]))]
    assert ranks_within(dear, torch.tensor(125.0), 0)[0].tolist() == [2, 1], (
        "the same loss at ten times the parameters"
    )


def test_continuing_a_spectrum():
    spectrum = torch.tensor(
        [[8.0, 4.0, 0, 0], [9.0, 9.0, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 0], [4.0, 3.0, 2.0, 1.0]]
    )
    filled = continued(spectrum, torch.tensor([2, 2, 1, 0, 4]))
    assert filled.tolist() == [[8, 4, 2, 1], [9, 9, 9, 9], [4, 2, 1, 0.5], [0, 0, 0, 0], [4, 3, 2, 1]]


def test_a_budget_that_regrows_gives_more_to_a_flat_spectrum_and_not_to_a_steep_one():
    spectrum = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1e-3, 0.0, 0.0]])
    current, allowed = torch.tensor([2, 2]), torch.tensor([True, True])
    bids = [Bids(spectrum, torch.tensor([1, 1]), current, allowed)]
    assert ranks_within(bids, torch.tensor(4.0), 0, regrowth=True)[0].tolist() == [4, 0]
    assert ranks_within(bids, torch.tensor(4.0), 1, regrowth=True)[0].tolist() == [3, 1]
    assert ranks_within(bids, torch.tensor(4.0), 0)[0].tolist() == [2, 2], "without regrowth nobody gets more"
    blocked = [Bids(spectrum, torch.tensor([1, 1]), current, ~allowed)]
    assert ranks_within(blocked, torch.tensor(9.0), 0, regrowth=True)[0].tolist() == [2, 2]
