"""The page on several processes: every row names a test that exists; the counts are the results file's."""

import ast

import pytest
from pages import page, rows, source_of_test

from benchmarks.cost import traffic

PAGE = page("docs/distributed.md")


def test_every_row_names_a_test_that_exists():
    found = [cells for cells in rows(PAGE) if "::" in cells[-1]]
    assert len(found) == 18
    for what, *_, test in found:
        file, name = test.split("::")
        tree = ast.walk(ast.parse(source_of_test(file)))
        assert name in {node.name for node in tree if isinstance(node, ast.FunctionDef)}, what


def test_the_table_of_traffic_is_the_results_files():
    assert traffic.table(traffic.load()) in page("docs/cost.md")


@pytest.mark.parametrize("processes", [2, 8])
def test_messages_are_counted_from_the_code(processes):
    """Gradients, weights before and after, and two averages of each shape; two sums over processes.

    The second says whether all gradients are finite.
    """
    row = traffic.count("tiny", processes)
    assert row.messages % 5 == 2
    share = (processes - 1) / processes
    assert 5 * row.pairs * share <= row.sent < 6 * row.pairs * share
    torchs = (row.fsdp, row.fsdp_nf4)
    assert min(torchs) > 2 * row.pairs * share
