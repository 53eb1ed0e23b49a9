"""The page on reliability names tests that exist, and how many cases they run."""

import ast
import re
import subprocess
import sys

import pytest
from pages import ROOT, page, rows

NAMED = {
    cells[2].strip("`"): cells[3]
    for cells in rows(page("docs/reliability.md"))
    if len(cells) == 4 and "::" in cells[2]
}


def test_every_row_of_a_kind_names_a_test():
    kinds = [cells for cells in rows(page("docs/reliability.md")) if cells[0] not in ("kind", "---")]
    assert len(kinds) == len(NAMED) > 10
    assert all(len(cells) == 4 and all(cells) for cells in kinds)


@pytest.mark.parametrize("name", NAMED)
def test_the_tests_exist(name):
    path, function = name.split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow  # collecting imports what the tests named import
def test_the_cases_are_those_that_are_collected():
    """A number that a test draws or counts itself is said in words, and is not looked at here."""
    counted = {name: int(cases.split(",")[0]) for name, cases in NAMED.items() if "drawn" not in cases}
    assert len(counted) > 10
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *counted], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    found = re.findall(r"^(tests/\S+?::\w+)", done.stdout, re.MULTILINE)
    assert {name: found.count(name) for name in counted} == counted
