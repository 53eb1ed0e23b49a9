"""Cuts of a trained adapter: the operators, the predictions, the file, its table and figure."""

import json

import pytest
import tiny
import torch

from benchmarks.__main__ import main
from benchmarks.tasks.task import Example, Task
from benchmarks.truncation import measure as truncation
from benchmarks.truncation import report as truncation_report
from grit_optim.rank.projections import paper_projection
from grit_optim.rank.selection import RankPolicy


def examples(count, seed, vocabulary=48):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(4, vocabulary, (count, 9), generator=generator).tolist()
    return tuple(Example(tuple(tokens[:6]), tuple(tokens[6:])) for tokens in drawn)


@pytest.fixture(scope="module")
def adapter():
    model = tiny.llama(rank=4, init_lora_weights=False)
    return truncation.gather(model, [examples(4, 0), examples(4, 1)], "cpu")


def products(adapter):
    return [b.double() @ a.double() for a, b in zip(adapter.a, adapter.b, strict=True)]


def cut(adapter, operators):
    return [b.double() @ m @ a.double() for a, b, m in zip(adapter.a, adapter.b, operators, strict=True)]


@pytest.mark.parametrize("name", truncation.METHODS)
def test_at_full_rank_nothing_changes_and_nothing_is_predicted(adapter, name):
    operators = truncation.METHODS[name](adapter, torch.full_like(adapter.curvature.ranks.rank, 4))
    for whole, same in zip(products(adapter), cut(adapter, operators), strict=True):
        torch.testing.assert_close(same, whole, rtol=1e-6, atol=1e-9)
    assert adapter.predicted(operators).abs().max() < 1e-9


@pytest.mark.parametrize("name", truncation.METHODS)
def test_every_method_leaves_the_rank_it_is_told(adapter, name):
    operators = truncation.METHODS[name](adapter, torch.full_like(adapter.curvature.ranks.rank, 2))
    assert len(operators) == 14
    for product in cut(adapter, operators):
        values = torch.linalg.svdvals(product)
        assert values[2] < 1e-6 * values[0] < values[1]


def test_the_svd_is_that_of_the_product(adapter):
    operators = truncation.svd_of_product(adapter, torch.full_like(adapter.curvature.ranks.rank, 2))
    for whole, product in zip(products(adapter), cut(adapter, operators), strict=True):
        u, values, vh = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(product, (u[:, :2] * values[:2]) @ vh[:2], rtol=1e-6, atol=1e-9)


def test_the_papers_projections_are_those_of_the_optimizer(adapter):
    rank, curvature = torch.full_like(adapter.curvature.ranks.rank, 2), adapter.curvature
    for name, two_sided in (("one-sided (paper)", False), ("two-sided (paper)", True)):
        operators = truncation.METHODS[name](adapter, rank)
        move, _ = paper_projection(
            curvature.factors,
            curvature.ranks.rank,
            RankPolicy(2, None, 1),
            curvature.factors_ready(),
            two_sided,
        )
        for i, product in enumerate(cut(adapter, operators)):
            b, a = adapter.b[i] @ move.b_weight[i], move.a_weight[i] @ adapter.a[i]
            torch.testing.assert_close(product, (b @ a).double(), rtol=1e-4, atol=1e-6)


def test_balanced_truncation_is_predicted_to_cost_its_energies_and_the_least(adapter):
    rank = torch.full_like(adapter.curvature.ranks.rank, 2)
    costs = {name: adapter.predicted(method(adapter, rank)) for name, method in truncation.METHODS.items()}
    energies = adapter.curvature.factors.price.double() * adapter.found.energy[:, 2:].sum(-1)
    torch.testing.assert_close(costs["balanced"], energies, rtol=1e-2, atol=1e-12)
    for name, cost in costs.items():
        assert (cost >= 0.99 * costs["balanced"]).all(), name


def test_the_first_order_part_is_the_slope_of_the_loss(adapter):
    """Along B + t (B M − B), at t = 0, on the examples of the factors."""
    operators = truncation.balanced(adapter, torch.full_like(adapter.curvature.ranks.rank, 2))
    rows = [*examples(4, 0), *examples(4, 1)]
    losses, step = [], 1e-3
    for t in (step, -step):
        adapter.apply(torch.eye(4, dtype=torch.float64) + t * (operators - torch.eye(4)))
        losses.append(truncation.evaluate(adapter.model, rows).loss)
    adapter.restore()
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float(adapter.first_order(operators).sum()), rel=0.05, abs=1e-5)


@pytest.fixture
def small_task(monkeypatch):
    task = Task("naming", examples(12, 2, 2048), examples(4, 3, 2048), "f" * 64)
    monkeypatch.setattr(truncation, "load_task", lambda name, tokenizer: task)
    return task


def test_cuts_are_written_and_report_draws_them(small_task, tmp_path, capsys):
    config = truncation.RunConfig("naming", "grit", 1e-2, 0, steps=3, batch_size=4, eval_every=3)
    truncation.truncation(config, 2, [8], [0.5], tmp_path, None)
    (path,) = tmp_path.glob("*.json")
    points = json.loads(path.read_text())["points"]
    assert len(points) == len(truncation.METHODS) + 1 + 28
    assert {p["rank"] for p in points if p["method"] != truncation.COMMON_BUDGET} == {8}
    assert all(p["parameters"] == pytest.approx(0.5) for p in points[: len(truncation.METHODS)])
    assert points[len(truncation.METHODS)]["parameters"] <= 0.5
    assert main(["report", str(tmp_path)]) == 0
    assert "| 8 |" in capsys.readouterr().out
    assert (tmp_path / "scatter.png").stat().st_size > 10_000
    assert truncation_report.holds(tmp_path)


def test_dropping_every_direction_is_refused(capsys):
    assert main(["truncation", "--drops", "16", "--out", "x"]) == 2
    assert "leaves nothing of rank 16" in capsys.readouterr().err
