"""The mathematics shows the distances that were measured, and names what exists."""

import re

import pytest
from evidence import RESULTS, fisher_distance
from pages import page, row, rows

from grit_optim import GritOptimizer

PAGE = page("docs/mathematics.md")
MODES = ("inverse", "steer", "spectral", "eigenbasis", "balanced")


def test_the_fisher_table_is_the_one_that_was_measured():
    folder = RESULTS / "fisher"
    measured = fisher_distance.table(fisher_distance.read(folder / "fisher.json"))
    assert (folder / "fisher.md").read_text(encoding="utf8") == measured
    assert measured.strip() in PAGE


@pytest.mark.parametrize("kind", ["kfac", "diagonal", "block_diagonal", "ekfac"])
def test_every_approximation_has_its_row(kind):
    assert len(row(PAGE, f"`{kind}`")) == 4


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_formula(mode):
    assert any(cells[0] == f"`{mode}`" for cells in rows(PAGE)) or f"`{mode}`: " in PAGE


def test_the_options_in_the_headings_exist():
    named = re.findall(r"^## .*\(`(.+)`\)$", PAGE, flags=re.MULTILINE)
    options = {name for found in named for name in re.findall(r"\w+", found)}
    assert len(options) >= 5
    assert options <= set(GritOptimizer.__init__.__kwdefaults__)
