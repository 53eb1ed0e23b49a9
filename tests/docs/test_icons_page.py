"""What the page on vision-language models says of the task icons is what the runs gave."""

import json
import statistics

import pytest
from evidence import RESULTS, runs_of, several
from pages import ROOT, page, table, words

from benchmarks.adapter_size.ways import budget_options
from benchmarks.core import packing
from benchmarks.suite.contenders import cost_name

PAGE = page("docs/vlm.md")
TEXT = words(PAGE)
SEEDS = (0, 1, 2)
GRIT, ADAMW, FRESH, MUON = ("grit", 0.9), ("adamw", 0.9), ("adamw", 0.6), ("muon", 0.9)
CONTENDERS = {
    "AdamW, β₁ = 0.9": ADAMW,
    "AdamW, β₁ = 0.6": FRESH,
    "LoRA-RITE, β₁ = 0.6": ("lorarite", 0.6),
    "Muon, momentum 0.6": MUON,
    "**GRIT around AdamW, β₁ = 0.9**": GRIT,
}
EQUAL = {"modality_weights": "equal"}


def rates(**factors):
    """The option that gives parts their rates."""
    return {"part_rates": factors}


def budget(share):
    """The options of a budget that is reached from a third to five sixths of the run."""
    return budget_options(60, share)


VARIANTS = {
    "GRIT": (GRIT, {}),
    'GRIT, `modality_weights="equal"`': (GRIT, EQUAL),
    "GRIT, encoder at half the rate": (GRIT, rates(vision=0.5)),
    "GRIT, encoder at a quarter of the rate": (GRIT, rates(vision=0.25)),
    "GRIT, encoder at twice the rate": (GRIT, rates(vision=2)),
    "GRIT, projector at four times the rate": (GRIT, rates(cross_modal=4)),
    "GRIT, decoder at half the rate": (GRIT, rates(text=0.5)),
    "AdamW, β₁ = 0.6": (FRESH, {}),
    "AdamW, β₁ = 0.6, encoder at half the rate": (FRESH, rates(vision=0.5)),
}
BUDGETS = {
    "all pairs compete": budget(0.62),
    "encoder 50 %, projector 100 %, decoder 70 %": budget(
        {"vision": 0.5, "cross_modal": 1.0, "text": 0.7005}
    ),
    "encoder 74 %, projector 100 %, decoder 50 %": budget(
        {"vision": 0.74, "cross_modal": 1.0, "text": 0.502}
    ),
    '`"effective"`': budget("effective"),
}


def runs(who, options=None, steps=60, lr=None):
    """The runs of a contender with these options, by learning rate and seed."""
    options = {"momentum": 0.6} if who == MUON else options or {}
    found = {}
    for run in runs_of("icons"):
        config = run["config"]
        assert config["task"] == "icons"
        mine = (config["optimizer"], config["beta1"]), config["options"], config["steps"]
        if mine == (who, options, steps) and lr in (None, config["lr"]):
            found[config["lr"], config["seed"]] = run
    return dict(sorted(found.items()))


def best_rate(who):
    """The learning rate that is best at seed 0."""
    ends = {lr: run["final_loss"] for (lr, seed), run in runs(who).items() if seed == 0}
    assert min(ends) < min(ends, key=ends.get) < max(ends), "bracketed"
    return min(ends, key=ends.get)


def seeds(who, options=None, steps=60):
    """The runs of the three seeds at the best rate; fewer where fewer ran."""
    return [*runs(who, options, steps, best_rate(who)).values()]


def ends(found):
    return [run["final_loss"] for run in found]


def mean(found, name):
    return statistics.fmean(run[name] for run in found)


@pytest.mark.parametrize("label", CONTENDERS)
def test_the_table_is_the_runs(label):
    who = CONTENDERS[label]
    first, chosen = {lr: run for (lr, seed), run in runs(who).items() if seed == 0}, seeds(who)
    assert len(chosen) == len(SEEDS)
    assert table(PAGE, "optimizer")[label] == [
        label,
        ", ".join(f"{lr:g}" for lr in first),
        ", ".join(f"{run['final_loss']:.3f}" for run in first.values()),
        several(ends(chosen)),
        f"{mean(chosen, 'word_f1'):.3f}",
        f"{100 * mean(chosen, 'exact_match'):.1f} %",
    ]


def differences(who, other, options=None):
    """Loss of the first less that of the other, seed by seed."""
    return [a - b for a, b in zip(ends(seeds(who, options)), ends(seeds(other)), strict=True)]


def below(numbers):
    """Smallest and largest, as the page writes them."""
    return f"{min(numbers):.3f} to {max(numbers):.3f}"


def test_what_is_said_of_the_table():
    assert f"{below([-d for d in differences(GRIT, FRESH)])} nats below the best AdamW" in TEXT
    against_muon = differences(MUON, GRIT)
    assert sum(d < 0 for d in against_muon) == 2
    assert f"lower at two seeds, higher at one, by {below([abs(d) for d in against_muon])}" in TEXT


def test_what_the_base_model_knows_is_its_record():
    record = json.loads((ROOT / "benchmarks/base_model/llava/training_record.json").read_text())
    seen, blank = (record[f"heldout_{name}"]["loss"] for name in ("of_bf16_file", "with_blank_pictures"))
    assert f"{seen:.2f} nats per token on names that pretraining never saw, {blank:.2f} with white" in TEXT
    assert f"pretraining took {record['cpu_seconds'] / 60:.0f} minutes of one core" in TEXT


def shown(chosen):
    """Loss at seed 0, of all seeds, and word F1."""
    return [f"{chosen[0]['final_loss']:.3f}", several(ends(chosen)), f"{mean(chosen, 'word_f1'):.3f}"]


@pytest.mark.parametrize("label", VARIANTS)
def test_what_changes_with_parts_and_kinds(label):
    assert table(PAGE, "run")[label] == [label, *shown(seeds(*VARIANTS[label]))]


@pytest.mark.parametrize("label", BUDGETS)
def test_what_budgets_cost(label):
    chosen = seeds(GRIT, BUDGETS[label])
    parts = chosen[0]["telemetry"]["modalities"]
    kept = ", ".join(str(parts[part]["ranks"]) for part in ("vision", "cross_modal", "text"))
    assert table(PAGE, "budget")[label] == [label, *shown(chosen), kept]


def test_every_row_has_its_runs():
    assert [*table(PAGE, "run")] == [*VARIANTS]
    assert [*table(PAGE, "budget")] == [*BUDGETS]


def test_what_is_said_of_parts_and_kinds():
    gained = [-d for d in differences(FRESH, FRESH, rates(vision=0.5))]
    assert f"takes {below(gained)} nats off AdamW's loss at every seed" in TEXT
    first, *others = differences(GRIT, GRIT, rates(vision=0.5))
    assert f"GRIT's falls by {-first:.3f} at one seed, and moves by less than 0.007 at the others" in TEXT
    assert max(map(abs, others)) < 0.007
    for more in (rates(vision=2), rates(cross_modal=4)):
        (worse,) = ends(seeds(GRIT, more))
        assert worse - seeds(GRIT)[0]["final_loss"] > 0.08
    assert max(map(abs, differences(GRIT, GRIT, EQUAL))) < 0.002


def test_equal_budgets_have_equal_parameters():
    """The shares of the parts in the adapter are those of its pairs' sizes."""
    sizes = {"vision": 258_048, "cross_modal": 15_360, "text": 312_320}
    for label, wanted in list(BUDGETS.items())[1:3]:
        share = sum(size * wanted["rank_budget"][part] for part, size in sizes.items()) / sum(sizes.values())
        assert share == pytest.approx(0.62, abs=5e-4), label
    whole, parts = (mean(seeds(GRIT, one), "final_loss") for one in list(BUDGETS.values())[:2])
    assert f"by {whole - parts:.3f} nats better on the mean" in TEXT


def test_what_is_said_of_the_rule_that_sizes_itself():
    rule, common = seeds(GRIT, BUDGETS['`"effective"`']), seeds(GRIT, BUDGETS["all pairs compete"])
    kept = sum(part["ranks"] for part in rule[0]["telemetry"]["modalities"].values())
    assert f"it keeps {kept} of 1,056 directions" in TEXT
    assert f"ends {rule[0]['final_loss'] - common[0]['final_loss']:.3f} nats above the one budget" in TEXT


def test_what_the_findings_say_of_the_tokens_curvature():
    first = {power: seeds(GRIT, {"kfac_power": power})[0]["final_loss"] for power in (0, 0.25)}
    whole, findings = seeds(GRIT)[0]["final_loss"], words(page("docs/findings.md"))
    said = f"with a quarter of its power {first[0.25]:.3f}, with the default's half {whole:.3f}"
    assert f"(power 0) {first[0]:.3f} nats, {said}" in findings
    equal, plain = (several(ends(seeds(GRIT, options)))[:5] for options in (EQUAL, {}))
    assert f"three seeds, 60 steps at 1e-2: {equal} nats, and {plain} as the tokens come" in findings


def budgets_of(who):
    """Mean losses of the three seeds by length of the run."""
    lengths = sorted({run["config"]["steps"] for run in runs_of("icons")})
    found = {steps: seeds(who, steps=steps) for steps in lengths}
    return {steps: mean(chosen, "final_loss") for steps, chosen in found.items() if len(chosen) == 3}


def test_the_numbers_of_the_seed():
    small, best = seeds(GRIT, BUDGETS["all pairs compete"]), seeds(FRESH)
    ours, theirs = (
        [mean(one, name) for name in ("final_loss", "word_f1", "exact_match")] for one in (small, best)
    )
    assert f"GRIT has {ours[0]:.3f} nats against {theirs[0]:.3f}, a word F1 of {ours[1]:.3f} against" in TEXT
    right = [f"{100 * one[2]:.1f} %" for one in (ours, theirs)]
    assert f"against {theirs[1]:.3f}, and {right[0]} of the names right against {right[1]}" in TEXT
    reached = [steps for steps, loss in budgets_of(GRIT).items() if loss <= theirs[0]]
    assert f"has AdamW's loss after {min(reached)} of the 60 steps" in TEXT
    timed = packing.read(RESULTS / "icons" / cost_name("icons", "grit"))["ratio"]
    spread = f"{timed['median']:.2f} times the time (quartiles {timed['q1']:.2f} and {timed['q3']:.2f})"
    saved = f"{100 * (1 - min(reached) / 60 * timed['median']):.0f} % less time"
    assert f"each of {spread}: {saved}" in TEXT
