"""The report of ranks: its numbers, its table, its JSON, and ranks of weights that were loaded."""

import json

import pytest
import support
import tiny
import torch

from grit_optim.rank.report import RankReport, SiteRank, effective_ranks, product_singular_values


@pytest.mark.parametrize("k", [1, 3, 5])
def test_k_equal_singular_values_have_entropy_rank_k(k):
    spectrum = torch.zeros(1, 6)
    spectrum[0, :k] = 0.7
    assert effective_ranks(spectrum, 0.999) == [(pytest.approx(k, rel=1e-5), k)]


def test_a_zero_spectrum_has_no_effective_rank():
    assert effective_ranks(torch.zeros(2, 4), 0.99) == [(None, None)] * 2


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(3, 7, 5), (4, 3, 9), (4, 9, 2)])
def test_singular_values_of_the_product(r, d_in, d_out):
    a, b = torch.randn(r, d_in), torch.randn(d_out, r)
    expected = torch.linalg.svdvals((b @ a).double())[:r]
    values = product_singular_values(a, b)
    assert values.shape == (r,)
    torch.testing.assert_close(values[: len(expected)], expected, rtol=1e-5, atol=1e-6)
    assert values[len(expected) :].abs().sum() < 1e-6


def test_ranks_is_a_dict_with_details():
    model = tiny.llama(rank=6)
    optimizer = tiny.grit(model, min_lora_rank=0)
    assert {s.entropy_rank for s in optimizer.ranks().sites} == {None}, (
        "nothing is known before the first step"
    )
    tiny.train(model, optimizer, 5)
    optimizer.reduce_ranks_(0.4)
    report = optimizer.ranks()
    assert isinstance(report, dict)
    assert report == {site.name: site.rank for site in report.sites}
    assert len(report) == 14
    for site in report.sites:
        size = site.parameters_before // site.rank_before
        assert site.rank_before == 6
        assert site.parameters == site.rank * size
        if site.rank:
            assert 1 <= site.entropy_rank <= site.rank + 1e-4
            assert 1 <= site.threshold_rank <= site.rank
        else:
            assert site.entropy_rank is None
        assert (site.predicted_loss > 0) == (site.rank < 6)
    assert (
        report.parameters == sum(site.parameters for site in report.sites) <= 0.4 * report.parameters_before
    )
    assert report.predicted_loss == pytest.approx(sum(s.predicted_loss for s in report.sites))
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_table():
    sites = [SiteRank("a", 2, 4, 1.5, 2, 20, 40, 0.0125), SiteRank("longer", 0, 4, None, None, 0, 4000, None)]
    assert RankReport(sites, 0.99).table().splitlines() == [
        "site     rank  of  entropy  τ=0.99  parameters     of  predicted loss",
        "a           2   4      1.5       2          20     40          0.0125",
        "longer      0   4        –       –           0  4,000               –",
        "2 sites     2   8                           20  4,040               –",
    ]


# -------------------------------------------------------------------- ranks of weights that were loaded


def balanced(**options):
    model = tiny.llama(layers=1)
    return model, tiny.grit(
        model, **{"reprojection": "balanced", "reprojection_freq": 100, "min_lora_rank": 0, **options}
    )


def set_directions(optimizer, sites, value):
    """Fill the last two directions of A and B of the named sites."""
    with torch.no_grad():
        for site in support.sites(optimizer):
            if site.name in sites:
                site.a[2:], site.b[:, 2:] = value, value


def test_ranks_follow_weights_that_lost_or_regained_directions():
    """Both ways, on some of the sites; only the factors of those that regained directions start anew."""
    model, optimizer = balanced()
    tiny.train(model, optimizer, 4)
    some = [site.name for site in support.sites(optimizer)][:3]
    set_directions(optimizer, some, 0.0)
    assert dict(optimizer.ranks()) == {name: 2 if name in some else 4 for name in optimizer.ranks()}
    seen = optimizer.telemetry()["samples"]
    assert min(seen.values()) > 0
    support.parts(optimizer).ranks.settle(optimizer.curvature)  # a question does not
    set_directions(optimizer, some, 0.3)
    assert set(optimizer.ranks().values()) == {4}
    assert optimizer.ranks().predicted_loss == 0
    assert optimizer.telemetry()["samples"] == {
        name: 0 if name in some else count for name, count in seen.items()
    }


def test_directions_that_regrew_with_a_zero_b_are_in_use():
    model, optimizer = balanced(rank_budget=(0.4, 0.5), rank_budget_steps=4, reprojection_freq=2)
    tiny.train(model, optimizer, 9)
    told = {
        name: int(rank)
        for c in optimizer.curvature
        for name, rank in zip(c.bucket.names(), c.ranks.rank, strict=True)
    }
    assert dict(optimizer.ranks()) == told


def test_the_paper_gives_no_rank_up_so_none_is_taken_from_the_weights():
    model, optimizer = balanced(reprojection="two_sided", reprojection_k=3, reprojection_freq=2)
    tiny.train(model, optimizer, 5)
    assert set(optimizer.ranks().values()) == {3}
    assert {int((site.a != 0).any(1).sum()) for site in support.sites(optimizer)} == {4}
    tiny.train(model, optimizer, 1, first=5)
    assert set(optimizer.ranks().values()) == {3}
