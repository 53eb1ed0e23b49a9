"""A suite's report, on made-up results."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from made_up_suite import ADAMW, SIZES, SMALL, usual

from benchmarks.core.files import BenchmarkError
from benchmarks.core.results import write_result
from benchmarks.suite import figures as suite_figures
from benchmarks.suite.contenders import PHASES
from benchmarks.suite.folder import FAILED, open_suite, read_ledger, read_suite
from benchmarks.suite.report import data, read_costs, report
from benchmarks.suite.run import run_suite
from benchmarks.suite.summary import entries
from benchmarks.tasks.registry import TASKS
from benchmarks.training import runner


def row(text, label):
    """The main table's row of a contender."""
    return next(line for line in text.splitlines() if line.startswith(f"| {label} |"))


def failing(run):
    if run.optimizer == "grit":
        raise ValueError("no such kernel\nsecond line")
    return usual(run)


def test_a_failure_is_named_kept_shown_and_mended(tmp_path, pretend):
    pretend(failing)
    with pytest.raises(
        BenchmarkError, match=r"3 runs failed; the others are done:\nnaming-grit-.*no such kernel"
    ):
        run_suite(tmp_path, SMALL, PHASES)
    assert len(list((tmp_path / FAILED).iterdir())) == 3
    line = row(report(tmp_path), "grit")
    assert line.endswith("| failed: ValueError: no such kernel |")
    assert line.count("–") == 5
    assert row(report(tmp_path), "adamw").endswith("|  |")
    pretend()
    run_suite(tmp_path, SMALL, PHASES)
    assert list((tmp_path / FAILED).iterdir()) == []
    assert "failed" not in report(tmp_path)


def test_a_failed_timing_is_shown_too(tmp_path, pretend, monkeypatch):
    pretend()

    def broken(*arguments):
        raise RuntimeError("clock")

    monkeypatch.setattr(runner, "in_process", broken)
    with pytest.raises(BenchmarkError, match=r"cost-naming-grit\.json: RuntimeError: clock"):
        run_suite(tmp_path, SMALL, PHASES)
    assert row(report(tmp_path), "grit").endswith("| cost failed: RuntimeError: clock |")


def test_the_table_says_what_the_results_say(tmp_path, drawn, pretend, capsys):
    pretend()
    run_suite(tmp_path, SMALL, PHASES)
    text = report(tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    assert text in capsys.readouterr().out
    # Means over seeds: 3 - 1 + 0.01 = 2.01; GRIT 0.22 below, β1 = 0.6 0.05 above. GRIT is 22 steps ahead: 80
    # on the grid of 5, 78 on straight lines; the other AdamW is 5 behind. Seeds shift all alike, so the
    # intervals are points.
    assert row(text, "grit") == (
        "| grit | 0.9, 0.99 | 1.790 ± 0.010 (n=3) | 0.80× (0.78; 0.78 to 0.78) | 0.96× | 1.20× (1.10 to "
        "1.30) | 2.00 MB |  |"
    )
    assert "| 2.010 ± 0.010 (n=3) | 1.00× (1.00; 1.00 to 1.00) | 1.20× |" in row(text, "adamw")
    assert "| adamw-0.6 | 0.6, 0.99 | 2.060 ± 0.010 (n=3) | 1.05× (1.05;" in text
    labels = [line.split(" | ")[0] for line in text.splitlines()[2:5]]
    assert labels == ["| grit", "| adamw", "| adamw-0.6"], "by mean loss"
    gaps = text[text.index("Loss less that of AdamW's best, seed by seed:") :].splitlines()[2:7]
    assert gaps[2:] == [
        "| grit | −0.220 ± 0.000 |",
        "| adamw | +0.000 ± 0.000 |",
        "| adamw-0.6 | +0.050 ± 0.000 |",
    ], "the seeds shift all alike"
    assert "- naming: 2.0100 nats per token, by adamw (β 0.9, 0.99) at learning rate 0.01" in text
    assert "task naming, 2 threads, median (quartiles), load of the machine before at most 0.2;" in text
    assert "3 seeds give only 10 different resamples" in text
    for name in ("curves", "learning_rates", "budgets", "steps_ratio"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_data_are_those_of_the_table(tmp_path, pretend):
    pretend()
    run_suite(tmp_path, SMALL, PHASES)
    report(tmp_path)
    ((group,), settings) = json.loads((tmp_path / "table.json").read_text()).values()
    assert settings["steps"] == 100
    assert group["targets"]["naming"] == {"loss": pytest.approx(2.01), "contender": "adamw"}
    grit = group["contenders"][0]
    assert (grit["label"], grit["steps_ratio"], grit["seconds_ratio"]) == ("grit", 0.8, pytest.approx(0.96))
    assert grit["tasks"]["naming"]["losses"] == pytest.approx([1.78, 1.79, 1.80])
    assert grit["tasks"]["naming"]["bracketed"] is True


def test_a_best_at_the_end_of_the_rates_never_goes_without_the_remark(tmp_path, pretend):
    pretend(
        lambda run: usual(run) if run.optimizer == "adamw" else 3.0 - math.log2(run.lr) - 0.01 * run.steps
    )
    run_suite(tmp_path, SMALL, PHASES)
    text = report(tmp_path)
    assert "not bracketed: best at the end of the rates tried" in row(text, "grit")
    assert "not bracketed" not in row(text, "adamw")
    assert "(end of the rates tried)" in text
    contenders = json.loads((tmp_path / "table.json").read_text())["groups"][0]["contenders"]
    assert {one["label"]: one["tasks"]["naming"]["bracketed"] for one in contenders}["grit"] is False


def test_diverged_runs_are_told(tmp_path, drawn, pretend):
    pretend(lambda run: None if run.optimizer == "grit" or run.lr > 0.01 else usual(run))
    run_suite(tmp_path, SMALL, PHASES)
    text = report(tmp_path)
    assert "diverged at every rate" in row(text, "grit")
    assert "diverged at 0.02" in row(text, "adamw")
    assert "| 2.010 ± 0.010 (n=3) |" in row(text, "adamw")


def test_who_never_reaches_the_target(tmp_path, drawn, pretend):
    pretend(lambda run: usual(run) + (1.0 if run.optimizer == "grit" else 0.0))
    run_suite(tmp_path, SMALL, PHASES)
    text = report(tmp_path)
    assert "| > 1.20× (not reached on 1 of 1) | > 1.44× |" in row(text, "grit")
    assert "| grit | not reached up to 1.20 |" in text
    assert (tmp_path / "steps_ratio.png").exists()


def test_means_over_tasks_need_every_task(tmp_path, pretend):
    pretend(lambda run: usual(run) + (0.1 if run.task == "second" and run.optimizer == "grit" else 0.0))
    two = replace(SMALL, tasks=("naming", "second"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "second", TASKS["naming"])
        run_suite(tmp_path, two, PHASES)
    text = report(tmp_path)
    assert "| 0.85× (0.83; 0.83 to 0.83) |" in row(text, "grit")  # (0.80 + 0.90) / 2; (0.78 + 0.88) / 2
    for path in tmp_path.glob("second-grit-*"):
        path.unlink()
    line = row(report(tmp_path), "grit")
    assert line.endswith("| second: unfinished: explore |")
    assert "| 1.790 ± 0.010 (n=3) | – | – | – |" in line


def test_an_unfinished_suite_says_so_and_has_no_target(tmp_path, pretend):
    pretend()
    run_suite(tmp_path, SMALL, ("explore",))
    text = report(tmp_path)
    assert row(text, "grit").endswith("| unfinished: narrow |")
    assert "- naming: no target, because AdamW's runs are not finished here" in text
    found = entries(read_suite(tmp_path).trials(read_ledger(tmp_path)), {})
    assert suite_figures.draw_ratios(found, tmp_path / "never.png") is None


def test_contenders_that_have_not_run_stand_below_the_table(tmp_path, pretend):
    pretend()
    run_suite(tmp_path, replace(SMALL, contenders=(ADAMW,)), PHASES)
    open_suite(tmp_path, SMALL)
    text = report(tmp_path)
    assert "Not run yet: adamw-0.6, grit." in text
    assert "| grit |" not in text
    assert row(text, "adamw")


def test_one_seed_gives_no_interval(tmp_path, pretend):
    pretend()
    run_suite(tmp_path, replace(SMALL, settings=replace(SIZES, seeds=(0,))), PHASES)
    text = report(tmp_path)
    assert "| 1.780 (n=1) | 0.80× (0.78) |" in row(text, "grit")
    assert "With one seed there is no interval." in text


def test_results_that_may_not_be_compared_get_tables_of_their_own(
    tmp_path, pretend, made_up_result, monkeypatch
):
    pretend()
    figures = []
    monkeypatch.setattr(suite_figures, "draw", lambda *arguments: figures.append(arguments[-1]) or [])
    run_suite(tmp_path, SMALL, PHASES)
    write_result(tmp_path, made_up_result(config={"seed": 9}, versions={"torch": "1.0"}))
    text = report(tmp_path)
    assert text.startswith("These runs are not all comparable, so they stand in 2 tables.")
    assert "### Table 1: version of torch: 1.0" in text
    assert figures == ["-1", "-2"]
    write_result(tmp_path, made_up_result(config={"seed": 8}, fingerprint="0" * 64))
    with pytest.raises(BenchmarkError, match="task naming: results on different data"):
        report(tmp_path)


def test_runs_of_different_numbers_of_jobs_share_a_table(tmp_path, pretend, made_up_result):
    pretend()
    run_suite(tmp_path, SMALL, PHASES)
    more = {"cpu": "a cpu", "cores": 2, "threads": 2, "gpu": None, "jobs": 7}
    write_result(tmp_path, made_up_result(config={"seed": 9}, hardware=more))
    assert "###" not in report(tmp_path)


def test_runs_of_several_commits_are_told(tmp_path, pretend):
    pretend()
    run_suite(tmp_path, SMALL, PHASES)
    for result in read_ledger(tmp_path).results.values():
        if (result["config"]["optimizer"], result["config"]["seed"]) == ("grit", 0):
            write_result(tmp_path, {**result, "code": {"commit": "d" * 40, "dirty": False}})
    found = {one["label"]: one["commits"] for one in suite_data(tmp_path)["contenders"]}
    assert found == {"grit": 2, "adamw": 1, "adamw-0.6": 1}
    assert "from runs of more than one commit of the project: grit (2).\n" in report(tmp_path)


def suite_data(folder):
    whole = read_suite(folder)
    return data(whole, read_ledger(folder), read_costs(folder, whole))


def test_an_empty_suite_has_no_report(tmp_path):
    open_suite(tmp_path, SMALL)
    with pytest.raises(BenchmarkError, match=r"no results in .*run the suite first"):
        report(tmp_path)


def test_training_curves_are_means_over_seeds_and_steps(made_up_result):
    runs = [made_up_result(train_losses=[base + step for step in range(8)]) for base in (0.0, 2.0)]
    assert suite_figures.training_curve(SimpleNamespace(runs=runs)) == [(6, 3.5), (7, 4.5), (8, 5.5)]
    assert suite_figures.training_curve(SimpleNamespace(runs=[])) == []
