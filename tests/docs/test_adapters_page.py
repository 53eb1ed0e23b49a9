"""The page on smaller adapters shows the tables that were printed, and its figures are those of the runs."""

import statistics

import peft
import tiny
import torch
from evidence import RESULTS, sizes, truncation
from pages import blocks, page, words

import grit_optim
from grit_optim import GritOptimizer

PAGE = page("docs/adapters.md")
TEXT = words(PAGE)


def printed(folder):
    return (RESULTS / folder / "table.md").read_text(encoding="utf8").strip()


def test_what_cuts_cost_is_what_was_measured():
    (result,) = truncation.read(RESULTS / "truncation")
    assert printed("truncation") == truncation.table(result).strip()
    for rank in (12, 8, 4):
        cells = [
            next(p for p in truncation.whole(result, method) if p["rank"] == rank)
            for method in truncation.METHODS
        ]
        row = " | ".join(f"{cell['measured']:.3f} ({cell['heldout']:.3f})" for cell in cells)
        assert f"| {rank} | {row} |".replace("-", "−") in PAGE


def test_how_true_the_prediction_is():
    (result,) = truncation.read(RESULTS / "truncation")
    small = [p for p in result["points"] if 1e-5 < p["predicted"] <= truncation.SMALL and p["site"] != "all"]
    plain, second = (
        statistics.median((p["measured"] - part * p["first_order"]) / p["predicted"] for p in small)
        for part in (0, 1)
    )
    said = (
        f"measured over predicted is {plain:.2f} in the median, over {len(small)} cuts predicted from 1e-5 to"
    )
    assert said in TEXT
    assert f"It is {second:.2f} without the first-order part" in TEXT
    balanced = {p["rank"]: p for p in truncation.whole(result, "balanced")}
    cut, deep = balanced[12], balanced[8]
    assert f"measure {cut['measured']:.4f} and were predicted at {cut['predicted']:.4f}" in TEXT
    assert f"8 of 16 measure {deep['measured']:.3f} against {deep['predicted']:.3f}" in TEXT
    (half,) = [
        p for p in truncation.whole(result, truncation.COMMON_BUDGET) if f"{p['parameters']:.0%}" == "50%"
    ]
    assert f"a common budget of 50 % {half['measured']:.3f} against {half['predicted']:.3f}" in TEXT


def test_the_table_of_sizes_is_the_one_that_was_printed():
    tasks = sizes.read(RESULTS / "sizes")
    assert printed("sizes") == sizes.table(tasks).strip()
    summary = sizes.summary(tasks, sizes.SHOWN)
    assert len(summary.splitlines()) > 10
    assert summary in PAGE


def rises(folder, budget):
    """By task and way, the rise of the loss in per cent at about one size."""
    found = {}
    for task, (series, _) in sizes.read(RESULTS / folder).items():
        for way, budgets in series.items():
            if points := budgets.get(budget):
                found.setdefault(task, {})[way] = 100 * sizes.against_whole(series, points)[1]
    return found


def test_what_half_the_bytes_cost():
    half = rises("sizes", sizes.SHOWN)
    ours = {task: ways.pop(sizes.OURS) for task, ways in half.items()}
    assert f"cost `rank_budget` {min(ours.values()):.1f} to {max(ours.values()):.1f} %" in TEXT
    assert f"on `signature` by {ours['signature'] - 100 * sizes.AIM:.2f} %" in TEXT
    below = {task: {way for way, rise in ways.items() if rise < ours[task]} for task, ways in half.items()}
    equal = {"grit, smaller rank", "grit, one-sided projection (paper)"}
    assert below == {
        "naming": set(),
        "packages": set(),
        "prose": equal,
        "signature": {*equal, "EVA (peft), grit", "grit, cut after training"},
    }
    assert all(half["signature"][way] < 100 * sizes.AIM for way in below["signature"])
    worst = {way: max(ways[way] for ways in half.values()) for way in half["prose"]}
    assert min(worst.values()) > 6 > max(ours.values())


def test_what_a_quarter_of_the_bytes_costs():
    quarter = rises("sizes", 0.25)
    ours = {task: 1 + ways[sizes.OURS] / 100 for task, ways in quarter.items()}
    smaller = {task: 1 + ways["grit, smaller rank"] / 100 for task, ways in quarter.items()}
    gains = {task: 100 * (1 - smaller[task] / ours[task]) for task in quarter}
    lower = sorted(gain for gain in gains.values() if gain > 0)
    assert len(lower) == 3
    assert f"by {lower[0]:.1f} to {lower[-1]:.1f} %" in TEXT
    assert f"{-gains['packages']:.0f} % higher on `packages`" in TEXT
    eva = {task for task, ways in quarter.items() if ways["EVA (peft), grit"] < ways[sizes.OURS]}
    assert eva == {"signature"}


def test_what_rounding_adds_is_what_was_measured():
    tasks = sizes.read(RESULTS / "sizes_rounded")
    assert printed("sizes_rounded") == sizes.table(tasks).strip()
    summary = sizes.summary(tasks, 0.75)
    assert summary.count("(n=3)") == 12  # three ways, four tasks
    assert summary in PAGE
    for series, _ in tasks.values():
        size, rise = sizes.against_whole(series, series["grit, saved in bf16"][0.75])
        assert f"{-size:.0%}" == "62%"
        assert rise < sizes.AIM


def test_the_code_runs(tmp_path, monkeypatch):
    """Block by block, on a model that has trained for a few steps."""
    monkeypatch.chdir(tmp_path)
    model = tiny.llama(layers=1)
    base = torch.optim.AdamW(tiny.trained(model), lr=1e-2)
    names = {"model": model, "base": base, "optimizer": GritOptimizer(base, model, min_lora_rank=0)}
    names |= {"torch": torch, "grit_optim": grit_optim, "GritOptimizer": GritOptimizer}
    after, during, saving = blocks(PAGE, "python")
    tiny.train(model, names["optimizer"], 4)
    exec(compile(after, "docs/adapters.md", "exec"), names)
    names["optimizer"].close()
    exec(compile(during, "docs/adapters.md", "exec"), names)
    tiny.train(model, names["optimizer"], 2)
    exec(compile(saving, "docs/adapters.md", "exec"), names)
    assert names["report"].as_dict()
    ranks = peft.PeftConfig.from_pretrained(tmp_path / "adapter").rank_pattern
    assert ranks
    assert min(ranks.values()) < 4
