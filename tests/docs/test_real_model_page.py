"""The tables of the real model, on the page of results, are what the runs gave."""

import statistics

import pytest
from evidence import RESULTS, finetuning, runs_of, several
from pages import page, row, table, words

PAGE = page("docs/results.md")
CONTENDERS = {
    "AdamW, β₁ = 0.9": ("adamw", 0.9),
    "AdamW, β₁ = 0.6": ("adamw", 0.6),
    "LoRA+, β₁ = 0.9": ("loraplus", 0.9),
    "LoRA-RITE, β₁ = 0.6": ("lorarite", 0.6),
    "SOAP on the rank's side, β₁ = 0.6": ("soap-rank", 0.6),
    "Muon, momentum 0.6": ("muon", 0.9),
    "**GRIT around AdamW, β₁ = 0.9**": ("grit", 0.9),
}
BATCHES = {"gsm8k": 8, "naming": 16}


def losses(task="gsm8k", seed=0, steps=60):
    """Learning rates and final losses of each contender, rates rising."""
    found = {}
    for run in runs_of("real"):
        config = run["config"]
        assert (config["base"], config["adapted_layers"]) == ("smollm2", 8)
        if (config["task"], config["seed"], config["steps"]) == (task, seed, steps):
            mine = found.setdefault((config["optimizer"], config["beta1"]), {})
            mine[config["lr"]] = run["final_loss"]
    return {who: dict(sorted(mine.items())) for who, mine in found.items()}


def at_the_best_rate(who, task="gsm8k"):
    """Final losses of the seeds, at the rate that is best at seed 0."""
    first = losses(task)[who]
    best = min(first, key=first.get)
    ends = [losses(task, seed).get(who, {}).get(best) for seed in (0, 1, 2)]
    return [end for end in ends if end is not None]


@pytest.mark.parametrize("task", BATCHES)
def test_the_table_of_the_real_model_is_the_runs(task):
    shown, found = table(PAGE, f"`{task}`"), losses(task)
    assert {CONTENDERS[label] for label in shown} == found.keys()
    for label, cells in shown.items():
        mine, ends = found[CONTENDERS[label]], at_the_best_rate(CONTENDERS[label], task)
        rates = ", ".join(f"{lr:g}" for lr in mine)
        assert cells == [label, rates, ", ".join(f"{loss:.3f}" for loss in mine.values()), several(ends)]


@pytest.mark.parametrize("task", BATCHES)
def test_the_runs_have_the_settings_that_are_told(task):
    configs = [run["config"] for run in runs_of("real") if run["config"]["task"] == task]
    assert {config["batch_size"] for config in configs} == {BATCHES[task]}
    assert {config["precision"] for config in configs} == {"fp32"}


def test_what_the_model_writes_itself():
    (run,) = finetuning.read(RESULTS / "real_answers")
    before, after = run["curve"]
    assert before["final_number_exact_match"] == 0
    assert before["generated"] == after["generated"] == 192
    assert (run["config"]["optimizer"], run["config"]["lr"]) == ("grit", 0.01)
    right = f"rate {100 * after['final_number_exact_match']:.1f} % do (`results/real_answers`)"
    assert f"after {run['config']['steps']} steps with grit at its best {right}" in words(PAGE).lower()


def differences(who, task):
    """Loss of a contender less GRIT's, seed by seed."""
    pairs = zip(at_the_best_rate(who, task), at_the_best_rate(("grit", 0.9), task), strict=True)
    return [theirs - ours for theirs, ours in pairs]


def test_grit_is_below_every_other_on_gsm8k():
    found = losses()
    best = {who: min(mine.values()) for who, mine in found.items()}
    assert len(best) == len(CONTENDERS)
    assert min(best, key=best.get) == ("grit", 0.9)
    for who, said in ((("adamw", 0.6), "the best AdamW"), (("muon", 0.9), "Muon with its momentum lowered")):
        gaps = differences(who, "gsm8k")
        assert f"{min(gaps):.3f} to {max(gaps):.3f}" in words(PAGE)
        assert said in words(PAGE)


def test_grit_is_below_the_others_on_naming():
    for who, said in ((("adamw", 0.6), "nats below the best AdamW"), (("muon", 0.9), "below Muon")):
        gaps = differences(who, "naming")
        assert len(gaps) == 3
        assert f"by {min(gaps):.3f} to {max(gaps):.3f} {said}" in words(PAGE)


def test_grit_is_below_adamw_at_every_rate_that_both_ran_at():
    gaps = []
    for task in BATCHES:
        for seed in (0, 1, 2):
            adamw, grit = (losses(task, seed).get((name, 0.9), {}) for name in ("adamw", "grit"))
            gaps += [adamw[lr] - grit[lr] for lr in adamw.keys() & grit.keys()]
    assert len(gaps) > 5
    assert f"on both tasks, by {min(gaps):.3f} to {max(gaps):.3f}" in words(PAGE)


def test_the_shortened_budgets():
    shortest, short = (losses(steps=steps)["grit", 0.9][0.01] for steps in (36, 48))
    usual, best = (min(losses()["adamw", beta].values()) for beta in (0.9, 0.6))
    assert f"GRIT ends at {shortest:.3f} after 36 steps and at {short:.3f} after 48" in words(PAGE)
    assert f"has {usual:.3f} after 60, and {best:.3f} at its best β₁" in words(PAGE)
    assert short < best < shortest
    assert f"are {48 / 60:g} of AdamW's here" in words(PAGE)


def test_the_column_of_the_readme_is_the_table():
    readme = page("README.md")
    who = {
        "AdamW, β₁ = 0.9 as usual": ("adamw", 0.9),
        "AdamW, best of four settings of β": ("adamw", 0.6),
        "Muon, momentum lowered to 0.6": ("muon", 0.9),
        "**GRIT around AdamW, β₁ = 0.9 as usual**": ("grit", 0.9),
    }
    for label, contender in who.items():
        assert row(readme, label)[5] == f"{statistics.fmean(at_the_best_rate(contender)):.3f}"
