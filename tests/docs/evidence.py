"""What the documents' figures are held to: the results files, through the benchmark's own readers."""

import statistics
from functools import cache

from pages import ROOT

from benchmarks.__main__ import make_parser
from benchmarks.adapter_size import report as sizes
from benchmarks.comparison.report import table as comparison_table
from benchmarks.comparison.summary import comparable
from benchmarks.core.results import read_results
from benchmarks.cost import report as cost_report
from benchmarks.cost import tables as cost_tables
from benchmarks.finetune import report as finetuning
from benchmarks.fisher_distance import report as fisher_distance
from benchmarks.suite import tables as suite_tables
from benchmarks.suite.folder import read_ledger, read_suite
from benchmarks.suite.report import read_costs
from benchmarks.suite.sweep import targets
from benchmarks.truncation import report as truncation

__all__ = [
    "PEERS",
    "RESULTS",
    "TASKS",
    "comparable",
    "comparison_table",
    "cost_report",
    "cost_tables",
    "final",
    "finals",
    "finetuning",
    "fisher_distance",
    "loss",
    "main_table",
    "make_parser",
    "part",
    "read_results",
    "runs_of",
    "several",
    "sizes",
    "suite_table",
    "target",
    "trials",
    "truncation",
]

RESULTS = ROOT / "benchmarks" / "results"
PEERS = RESULTS / "peers"
TASKS = ("naming", "prose", "signature", "packages")


@cache
def suite_table():
    """The Markdown that ``report`` makes of the suite's runs."""
    suite = read_suite(PEERS)
    return suite_tables.table(suite, read_ledger(PEERS), read_costs(PEERS, suite)).strip()


def main_table():
    """The suite's table of losses, a row per contender."""
    return suite_table().split("\n\n")[0]


def part(heading):
    """The table or list below a heading of the suite's Markdown."""
    paragraphs = suite_table().split("\n\n")
    return paragraphs[paragraphs.index(heading) + 1]


@cache
def trials():
    """The suite's trials by the contender's label and the task."""
    found = read_suite(PEERS).trials(read_ledger(PEERS))
    return {(trial.contender.label, trial.task): trial for trial in found}


def loss(label, task):
    """A contender's mean held-out loss on a task at its best rate."""
    return trials()[label, task].loss


def target(task):
    """AdamW's best mean held-out loss on a task."""
    return targets(list(trials().values()))[task]


@cache
def runs_of(folder):
    """All runs of a folder, read once; they are not to be changed."""
    return read_results(RESULTS / folder)


def several(losses):
    """Mean and standard deviation of three seeds, as pages write them; a dash where fewer ran."""
    return f"{statistics.fmean(losses):.3f} ± {statistics.stdev(losses):.3f}" if len(losses) == 3 else "–"


def finals(folder, seeds=None, optimizer=None, beta1=None, steps=None, **wanted):
    """Final held-out losses of the runs of a folder that have the wanted settings, in the order of the seeds.

    ``options`` defaults to none; a setting that is left out may have one value only.
    """
    wanted = {"options": {}, **wanted}
    for name, value in (("optimizer", optimizer), ("beta1", beta1), ("steps", steps)):
        if value is not None:
            wanted[name] = value
    chosen = [
        run["config"] | {"loss": run["final_loss"]}
        for run in runs_of(folder)
        if all(run["config"][name] == value for name, value in wanted.items())
        and (seeds is None or run["config"]["seed"] in seeds)
    ]
    chosen.sort(key=lambda run: run["seed"])
    if not chosen:
        raise LookupError(f"{folder}: no run has {wanted}")
    found = [run["seed"] for run in chosen]
    assert found == sorted(set(found)), f"{folder}: {wanted} names more than one kind of run"
    assert found == list(seeds if seeds is not None else found)
    return [run["loss"] for run in chosen]


def final(folder, seeds=None, **wanted):
    """The mean of :func:`finals`."""
    return statistics.fmean(finals(folder, seeds, **wanted))
