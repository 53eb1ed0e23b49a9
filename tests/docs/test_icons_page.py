"""What the page on vision-language models says of the task icons is what the runs gave."""

import json

import pytest
from evidence import RESULTS, read_results
from pages import ROOT, page, row

PAGE = page("docs/vlm.md")
TEXT = " ".join(PAGE.split())
CONTENDERS = {
    "AdamW, β₁ = 0.9": ("adamw", None),
    "GRIT around AdamW, β₁ = 0.9": ("grit", None),
    'GRIT with `modality_weights="equal"`': ("grit", "equal"),
}


def runs():
    """The runs of each contender, rates rising."""
    found = {}
    for run in read_results(RESULTS / "icons"):
        config = run["config"]
        assert (config["task"], config["steps"], config["seed"]) == ("icons", 60, 0)
        assert config["beta1"] == 0.9
        assert config["options"].keys() <= {"modality_weights"}
        found.setdefault((config["optimizer"], config["options"].get("modality_weights")), []).append(run)
    return {who: sorted(mine, key=lambda run: run["config"]["lr"]) for who, mine in found.items()}


def best(who):
    return min(runs()[who], key=lambda run: run["final_loss"])


@pytest.mark.parametrize("label", CONTENDERS)
def test_the_table_is_the_runs(label):
    mine, first = runs()[CONTENDERS[label]], best(CONTENDERS[label])
    assert row(PAGE, label) == [
        label,
        ", ".join(f"{run['config']['lr']:g}" for run in mine),
        ", ".join(f"{run['final_loss']:.3f}" for run in mine),
        f"{first['word_f1']:.3f}",
        f"{100 * first['exact_match']:.1f} %",
    ]


def test_what_the_base_model_knows_is_its_record():
    record = json.loads((ROOT / "benchmarks/base_model/llava/training_record.json").read_text())
    seen, blank = (record[f"heldout_{name}"]["loss"] for name in ("of_bf16_file", "with_blank_pictures"))
    assert f"{seen:.2f} nats per token on names that pretraining never saw, {blank:.2f} with white" in TEXT
    assert f"pretraining took {record['cpu_seconds'] / 60:.0f} minutes of one core" in TEXT


def test_equal_shares_are_within_a_hundredth():
    plain, equal = (best(("grit", weights))["final_loss"] for weights in (None, "equal"))
    assert abs(equal - plain) < 0.01
    assert f"{equal - plain:+.3f} nats" in TEXT
