"""The page on several processes: every row names a test that exists; the counts are the results file's."""

import ast
from operator import attrgetter

import pytest
from pages import page, rows, source_of_test, words

from benchmarks.cost import traffic
from benchmarks.cost.shapes import SHAPES

PAGE = page("docs/distributed.md")
FSDP, FSDP_NF4 = attrgetter("fsdp"), attrgetter("fsdp_nf4")


def test_every_row_names_a_test_that_exists():
    found = [cells for cells in rows(PAGE) if "::" in cells[-1]]
    assert len(found) == 22
    for what, *_, test in found:
        file, name = test.split("::")
        tree = ast.walk(ast.parse(source_of_test(file)))
        assert name in {node.name for node in tree if isinstance(node, ast.FunctionDef)}, what


def test_the_table_of_traffic_is_the_results_files():
    assert traffic.table(traffic.load()) in page("docs/cost.md")


def test_what_is_sent_is_below_the_aim():
    """1 % of what FSDP2 sends, also where it sends four bits a weight; and memory falls with processes."""
    found = traffic.load()
    for row in found:
        assert row.sent < 0.01 * min(row.fsdp, row.fsdp_nf4)
    assert {row.mode for row in found} == set(traffic.MODES)
    for model in traffic.MODELS:
        of_model = [row for row in found if (row.model, row.mode) == (model, traffic.MODES[0])]
        assert [row.processes for row in of_model] == list(traffic.PROCESSES)
        held = [row.memory for row in of_model]
        assert sorted(held, reverse=True) == held


def test_the_findings_shares_are_those_of_the_files():
    for counted, digits in (
        (traffic.load(traffic.OUT.with_name("whole_rows.json")), 1),
        (traffic.load(), 2),
    ):
        shares = [100 * row.sent / row.fsdp for row in counted if row.mode == traffic.MODES[0]]
        assert f"{min(shares):.{digits}f} to {max(shares):.{digits}f} %" in page("docs/findings.md")


def test_the_shares_that_are_promised_are_those_of_the_file():
    rows = [row for row in traffic.load() if row.mode == traffic.MODES[0]]
    bf16, nf4 = (max(100 * row.sent / size(row) for row in rows) for size in (FSDP, FSDP_NF4))
    assert 0.25 < bf16 < 0.3
    assert 0.7 < nf4 < 0.8
    assert "below 0.3 % of what FSDP2 itself sends in bf16, below 0.8 % around a base in NF4" in words(PAGE)


@pytest.mark.parametrize("processes", [2, 8, 64])
def test_messages_are_counted_from_the_code(processes):
    """A's moment goes forth to shards of columns, and its step back. The rest are sums.

    There are six of these over all pairs, beside the factors' and whether all gradients are finite. The
    largest have a number for each column of A, and three r×r matrices a pair.
    """
    row = traffic.count("tiny", processes)
    assert row.messages == 2 + 6 + 2
    sizes = traffic.linear_layers(SHAPES["tiny"]) * SHAPES["tiny"]["num_hidden_layers"]
    columns, rank = sum(columns for _, columns in sizes), traffic.RANK
    most = -(-rank // processes)
    holders = -(-rank // most)
    moved = 4 * columns * ((processes - 1) * most + (holders - 1) * most) / processes
    summed = 2 * 4 * (columns + 5 * rank**2 * len(sizes))
    assert moved < row.sent < moved + summed
