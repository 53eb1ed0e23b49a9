"""The table of the real model, on the page of results, is what the runs gave."""

import pytest
from evidence import RESULTS, read_results
from pages import page, row

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


def losses():
    """Learning rates and final losses of each contender, rates rising."""
    found = {}
    for run in read_results(RESULTS / "real"):
        config = run["config"]
        assert (config["task"], config["base"], config["adapted_layers"]) == ("gsm8k", "smollm2", 8)
        mine = found.setdefault((config["optimizer"], config["beta1"]), {})
        mine[config["lr"]] = run["final_loss"]
    return {who: dict(sorted(mine.items())) for who, mine in found.items()}


@pytest.mark.parametrize("label", CONTENDERS)
def test_the_table_of_the_real_model_is_the_runs(label):
    mine = losses()[CONTENDERS[label]]
    rates = ", ".join(f"{lr:g}" for lr in mine)
    assert row(PAGE, label) == [
        label, rates, ", ".join(f"{loss:.3f}" for loss in mine.values()), f"{min(mine.values()):.3f}"
    ]  # fmt: skip


def test_grit_is_below_every_other():
    found = losses()
    best = {who: min(mine.values()) for who, mine in found.items()}
    assert len(best) == len(CONTENDERS)
    assert min(best, key=best.get) == ("grit", 0.9)
