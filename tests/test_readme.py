"""What the README says is what the code does and what the results files hold."""

import inspect
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.adapter_size import report as adapter_sizes_report
from benchmarks.comparison.report import table
from benchmarks.comparison.summary import comparable
from benchmarks.core import packing
from benchmarks.core.results import read_results
from benchmarks.suite import tables as suite_tables
from benchmarks.suite.folder import read_ledger, read_suite
from benchmarks.suite.report import read_costs
from benchmarks.suite.sweep import targets
from benchmarks.truncation import report as truncation_report
from grit_optim import GritOptimizer

ROOT = Path(__file__).parent.parent
README, OPTIONS = ((ROOT / path).read_text(encoding="utf8") for path in ("README.md", "docs/options.md"))


def options():
    parameters = inspect.signature(GritOptimizer.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "sites"}


def documented():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", OPTIONS, flags=re.MULTILINE)
    return {name: (default.strip("`"), text) for name, default, text in rows}


def test_every_option_is_in_the_table_with_its_default():
    rows = documented()
    assert set(rows) == set(options())
    for name, default in options().items():
        assert rows[name][0] == (f'"{default}"' if isinstance(default, str) else str(default)), name
        assert len(rows[name][1]) > 20, name


def test_the_options_named_in_the_readme_exist():
    section = README[README.index("### Options\n") : README.index("## In a trainer\n")]
    named = set(re.findall(r"`(\w+)`", section))
    assert len(named) >= 6
    assert named <= set(options())


@pytest.mark.parametrize("command", ["benchmarks/main.sh", "tests/run.sh"])
def test_the_two_commands_exist(command):
    assert f"bash {command}" in README
    assert (ROOT / command).stat().st_mode & 0o111


def test_the_main_jobs_table_is_the_one_that_was_printed():
    """Figures come from the results files; nobody edits them in the README."""
    results = ROOT / "benchmarks" / "results" / "main"
    found = comparable(read_results(results))
    assert len(found) == 1
    assert (results / "table.md").read_text(encoding="utf8").strip() == table(found[0][1]).strip()
    assert table(found[0][1]).strip() in README


def test_the_suites_table_is_the_one_that_was_printed():
    results = ROOT / "benchmarks" / "results" / "peers"
    suite = read_suite(results)
    text = suite_tables.table(suite, read_ledger(results), read_costs(results, suite)).strip()
    assert (results / "table.md").read_text(encoding="utf8").strip() == text
    paragraphs = text.split("\n\n")
    main_table, targets = paragraphs[0], paragraphs[paragraphs.index("Targets (AdamW's best):") + 1]
    assert len(main_table.splitlines()) > 4
    assert main_table in README
    assert targets in README
    gaps = paragraphs[paragraphs.index("Loss less that of AdamW's best, seed by seed:") + 1].splitlines()
    names = ("| optimizer |", "| --- |", "| grit |", "| muon-0.6 |", "| muon-0.8 |")
    shown = [line for line in gaps if line.startswith(names)]
    assert len(shown) == 5
    assert "\n".join(shown) in README


def test_nothing_need_be_retuned():
    """At the rate that is best for AdamW with its usual beta1, GRIT is below AdamW's best over all its betas and rates."""
    results = ROOT / "benchmarks" / "results" / "peers"
    trials = read_suite(results).trials(read_ledger(results))
    by_name = {(trial.contender.label, trial.task): trial for trial in trials}
    there = []
    for task, target in targets(trials).items():
        adamw, grit = by_name["adamw", task], by_name["grit", task]
        assert grit.contender.rate(adamw.best) == adamw.contender.rate(adamw.best)
        runs = grit.configs(adamw.best, grit.settings.steps)
        assert len(runs) == 3
        there.append((task, grit.ledger.mean(runs)))
        assert there[-1][1] < target
    assert len(there) == 4
    assert ", ".join(f"{loss:.3f} on `{task}`" for task, loss in there) in README


def test_the_cost_is_the_one_that_was_measured():
    ratio = packing.read(ROOT / "benchmarks" / "results" / "cost" / "cost-naming-grit.json")["ratio"]
    measured = f"**{ratio['median']:.3f}×** step by step (quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f})"
    assert measured in README


def test_what_cuts_cost_is_what_was_measured():
    folder = ROOT / "benchmarks" / "results" / "truncation"
    results = truncation_report.read(folder)
    assert len(results) == 1
    result = results[0]
    assert (folder / "table.md").read_text(encoding="utf8").strip() == truncation_report.table(result).strip()
    for rank in (12, 8, 4):
        cells = [
            next(p for p in truncation_report.whole(result, method) if p["rank"] == rank)
            for method in truncation_report.METHODS
        ]
        row = " | ".join(f"{cell['measured']:.3f} ({cell['heldout']:.3f})" for cell in cells).replace(
            "-", "−"
        )
        assert f"| {rank} | {row} |" in README
    alone = [
        p for p in result["points"] if p["site"] != "all" and 1e-5 < p["predicted"] <= truncation_report.SMALL
    ]
    ratios = [
        [(p["measured"] - first * p["first_order"]) / p["predicted"] for p in alone] for first in (0, 1)
    ]
    said = "predicted is {:.2f} in the median ({:.2f} without the first-order part".format(
        *map(statistics.median, ratios)
    )
    assert said in README
    assert f"over {len(alone)} cuts" in README


def test_the_table_of_sizes_is_the_one_that_was_printed():
    folder = ROOT / "benchmarks" / "results" / "sizes"
    tasks = adapter_sizes_report.read(folder)
    text, summary = (
        adapter_sizes_report.table(tasks),
        adapter_sizes_report.summary(tasks, adapter_sizes_report.SHOWN),
    )
    assert (folder / "table.md").read_text(encoding="utf8").strip() == text.strip()
    assert len(summary.splitlines()) > 4
    assert summary in README
    assert f"({(folder / 'loss_against_bytes.png').relative_to(ROOT)})" in README


def test_what_rounding_adds_is_what_was_measured():
    folder = ROOT / "benchmarks" / "results" / "sizes_rounded"
    tasks = adapter_sizes_report.read(folder)
    assert (folder / "table.md").read_text(encoding="utf8").strip() == adapter_sizes_report.table(
        tasks
    ).strip()
    summary = adapter_sizes_report.summary(tasks, 0.75)
    assert summary.count("(n=3)") == 12  # three ways, four tasks
    assert summary in README
    for series, _ in tasks.values():
        size, rise = adapter_sizes_report.against_whole(series, series["grit, saved in bf16"][0.75])
        assert size < -0.5
        assert rise < adapter_sizes_report.AIM


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
