"""``python -m grit_optim options``: the page has a row for each option, as it is declared."""

from grit_optim.__main__ import main
from grit_optim.options import DECLARED


def test_the_page_has_every_option_once_with_its_default(capsys):
    assert main(["options"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    defaults = {row.split("`")[1]: row.split("`")[3] for row in rows}
    assert list(defaults) == [row.split("`")[1] for row in rows] == list(DECLARED)
    assert defaults["precondition"] == '"spectral"'
    assert defaults["kfac_min_samples"] == "64"
    assert defaults["rank_budget"] == "None"


def test_the_page_keeps_its_tables_whole(capsys):
    """A bar in a meaning is escaped, or it would begin another cell."""
    main(["options"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {4}
