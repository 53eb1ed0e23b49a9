"""The page of options has every option with its default."""

import inspect

from pages import page, rows

from grit_optim import GritOptimizer
from grit_optim.options.documentation import markdown

PAGE = page("docs/options.md")


def options():
    parameters = inspect.signature(GritOptimizer.__init__).parameters.values()
    others = ("sites", "modality_of", "process_group")  # what the model is, and where it is trained
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in others}


def test_every_option_is_in_a_table_with_its_default():
    found = {cells[0].strip("`"): cells[1:] for cells in rows(PAGE) if cells[0].startswith("`")}
    assert set(found) == set(options())
    for name, default in options().items():
        assert found[name][0].strip("`") == (f'"{default}"' if isinstance(default, str) else str(default)), (
            name
        )
        assert len(found[name][1]) > 20, name


def test_the_page_is_the_one_that_the_command_prints():
    assert markdown() == PAGE
