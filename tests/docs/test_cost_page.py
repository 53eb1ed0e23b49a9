"""What the page on costs says is what the results files hold."""

import re

import pytest
from evidence import RESULTS, cost_report, cost_tables, main_table
from pages import page, row, words

PAGE = page("docs/cost.md")
TEXT = words(PAGE)
COST = RESULTS / "cost"


@pytest.fixture(scope="module")
def counts():
    return cost_report.read(COST, "count")


@pytest.fixture(scope="module")
def large(counts):
    wanted = {"model": "llama-3-8b-shape", "length": 2048, "layers": None}  # None: all of them
    (found,) = [c for c in counts if wanted.items() <= c["workload"].items()]
    return found


@pytest.fixture(scope="module")
def measured():
    (found,) = [c for c in cost_report.read(COST, "cost") if not c["hardware"]["gpu"]]
    return found


def test_the_count_at_8b_is_the_one_that_was_made(large):
    assert large["parameters"]["sites"] == 224
    work = large["workload"]
    assert (work["rank"], work["accumulation"], large["optimizer"]) == (16, 4, "grit")
    assert words(cost_tables.count_table(large)) in TEXT
    assert cost_tables.count_sentence(large) in TEXT


def test_so_are_the_other_sizes(counts):
    assert len(counts) >= 3
    assert cost_tables.sizes_table(counts) in PAGE


def test_the_folders_table_is_the_one_that_was_printed():
    assert (COST / "table.md").read_text(encoding="utf8") == cost_report.table(COST)


def test_the_measured_step_is_the_one_of_the_file(measured):
    ratio = measured["ratio"]
    quartiles = f"(quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f})"
    assert f"GRIT {ratio['median']:.3f}× AdamW's step {quartiles}" in PAGE
    assert f"takes **{ratio['median']:.3f}×** the time of one with AdamW {quartiles}" in TEXT
    stages = {name: f"{1e3 * seconds:.1f} ms" for name, seconds in measured["stage_seconds_per_step"].items()}
    assert f"Capture takes {stages['capture']} of it, folding {stages['fold']}," in TEXT
    assert f"refreshing the roots {stages['refresh']}, turning the step {stages['precondition']}." in TEXT
    assert f"AdamW itself takes {stages['base']}" in TEXT
    plain = measured["step_seconds"]["plain adamw"]["median"]
    assert f"the whole AdamW step some {1e3 * plain:.0f} ms" in TEXT
    state = measured["optimizer_state_bytes"]
    assert f"has {state['optimizer']:,} bytes instead of {state['plain adamw']:,}" in TEXT


def test_the_state_is_the_one_of_the_suite(measured):
    """Two commands measured it; they agree."""
    assert f"{measured['optimizer_state_bytes']['optimizer'] / 1e6:.2f} MB" == row(main_table(), "grit")[9]


def test_no_figure_of_a_gpu_is_claimed_before_there_is_one():
    found = [c for c in cost_report.read(COST, "cost") if c["hardware"]["gpu"]]
    assert bool(found) != ("**open**: nothing has been measured on a GPU yet" in PAGE)


def test_the_commands_that_made_the_files_are_named(counts):
    text = words(PAGE[PAGE.index("Other sizes:") :])
    lengths = {c["workload"]["length"] for c in counts} - {2048}
    layers = {c["workload"]["layers"] for c in counts} - {None}
    models = {c["workload"]["model"] for c in counts}
    assert all(f"`--length {length}`" in text for length in lengths)
    assert all(f"`--layers {layer}`" in text for layer in layers)
    assert all(f"`count --model {model}`" in text for model in models)
    assert set(re.findall(r"count --model ([\w.-]+)`", text)) == models
