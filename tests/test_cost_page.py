"""What the page on costs says is what the results files hold, and its commands exist."""

import re

import pytest

from benchmarks.__main__ import make_parser
from benchmarks.core import packing
from benchmarks.core.files import REPOSITORY
from benchmarks.cost.report import read, table
from benchmarks.cost.tables import count_sentence, count_table, sizes_table

PAGE = (REPOSITORY / "benchmarks" / "COST.md").read_text(encoding="utf8")
README = (REPOSITORY / "README.md").read_text(encoding="utf8")
RESULTS = REPOSITORY / "benchmarks" / "results" / "cost"


@pytest.fixture(scope="module")
def counts():
    return read(RESULTS, "count")


@pytest.fixture(scope="module")
def large(counts):
    wanted = {"model": "llama-3-8b-shape", "length": 2048, "layers": None}  # None: all of them
    (found,) = [c for c in counts if wanted.items() <= c["workload"].items()]
    return found


def test_the_count_at_8b_is_the_one_that_was_made(large):
    assert large["parameters"]["sites"] == 224
    assert (large["workload"]["rank"], large["workload"]["accumulation"], large["optimizer"]) == (
        16,
        4,
        "grit",
    )
    assert count_table(large) in PAGE


def test_so_are_the_other_sizes(counts):
    assert len(counts) >= 3
    assert sizes_table(counts) in PAGE


def test_the_folders_table_is_the_one_that_was_printed():
    assert (RESULTS / "table.md").read_text(encoding="utf8") == table(RESULTS)


def test_what_the_readme_says_of_it(large):
    words = " ".join(README.split())
    assert count_sentence(large) in words


def test_the_measured_row_is_the_one_of_the_file():
    ratio = packing.read(RESULTS / "cost-naming-grit.json")["ratio"]
    assert (
        f"GRIT {ratio['median']:.3f}× AdamW's step (quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f})" in PAGE
    )


def test_no_figure_of_a_gpu_is_claimed_before_there_is_one():
    measured = [c for c in read(RESULTS, "cost") if c["hardware"]["gpu"]]
    assert bool(measured) != ("**open**: nothing has been measured on a GPU yet" in PAGE)


@pytest.mark.parametrize("text", [PAGE, README], ids=["page", "readme"])
def test_the_commands_are_understood(text):
    commands = re.findall(
        r"^python -m benchmarks ((?:cost|count|report) .*?)(?: {2,}#.*)?$", text, flags=re.MULTILINE
    )
    assert len(commands) >= 3
    for command in commands:
        make_parser().parse_args(command.split())


def test_the_script_is_there_to_run():
    script = REPOSITORY / "benchmarks" / "gpu.sh"
    assert script.stat().st_mode & 0o111
    assert "bash benchmarks/gpu.sh" in README
    assert "bash benchmarks/gpu.sh" in PAGE
