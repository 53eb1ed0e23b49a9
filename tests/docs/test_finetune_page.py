"""The page on fine-tuning shows the comparison that was printed."""

from evidence import RESULTS, finetuning
from pages import commands, page, words

PAGE = page("docs/finetune.md")


def test_the_comparisons_table_is_the_one_that_was_printed():
    folder = RESULTS / "qlora"
    found = finetuning.read(folder)
    printed = finetuning.table(found).strip()
    assert (folder / "table.md").read_text(encoding="utf8").strip() == printed
    assert printed.partition("\n\n")[0] in PAGE
    assert words(printed) in words(PAGE)
    assert {metrics["code"]["dirty"] for metrics in found} == {False}


def test_what_did_not_run_is_said():
    """Rates and seeds of the grid that have no run."""
    ran = {
        (r["config"]["optimizer"], r["config"]["lr"], r["config"]["seed"])
        for r in finetuning.read(RESULTS / "qlora")
    }
    assert {(name, lr) for name, lr, seed in ran if seed == 1} == {
        ("adamw8bit", 1e-2), ("grit", 1e-2), ("grit", 2e-2),
    }  # fmt: skip
    assert ("adamw8bit", 4e-2, 42) not in ran
    assert len(ran) == 10


def test_there_are_commands_to_follow():
    assert len(commands(PAGE, "python -m benchmarks train ")) >= 6  # test_pages.py holds the parser to them
