"""A suite's folder on made-up results: it runs to the end, goes on, and refuses what does not fit."""

from dataclasses import replace

import pytest
from made_up_suite import ADAMW, GRIT, SIZES, SMALL

from benchmarks.core.files import BenchmarkError, write_json
from benchmarks.core.results import write_result
from benchmarks.suite.contenders import PHASES, cost_name
from benchmarks.suite.folder import FAILED, open_suite, read_ledger, read_suite
from benchmarks.suite.run import run_suite


def test_the_suite_runs_to_the_end_and_not_again(tmp_path, pretend, capsys):
    done = pretend()
    run_suite(tmp_path, SMALL, PHASES)
    names = [run.file_name() for run in done]
    assert len(set(names)) == len(names) == len(read_ledger(tmp_path).results)
    assert "to do now, about" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("cost-*")} == {
        cost_name("naming", one.label) for one in SMALL.contenders
    }
    run_suite(tmp_path, SMALL, PHASES)
    assert len(done) == len(names)


def test_more_seeds_and_contenders_join_what_is_there(tmp_path, pretend):
    done = pretend()
    run_suite(tmp_path, replace(SMALL, settings=replace(SIZES, seeds=(0,)), contenders=(ADAMW,)), PHASES)
    before = len(done)
    run_suite(tmp_path, replace(SMALL, contenders=(GRIT,)), PHASES)
    whole = read_suite(tmp_path)
    assert [one.label for one in whole.contenders] == ["adamw", "grit"]
    assert whole.settings.seeds == (0, 1, 2)
    assert {run.optimizer for run in done[before:]} == {"grit"}, "only what was asked for"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            replace(SMALL, settings=replace(SIZES, steps=50, explore_steps=50)),
            "a suite with steps 100, asked for is 50",
        ),
        (replace(SMALL, contenders=(replace(GRIT, lr=0.5),)), "a contender 'grit' with other settings"),
    ],
)
def test_what_does_not_belong_into_the_folder_is_refused(tmp_path, changed, message):
    open_suite(tmp_path, SMALL)
    with pytest.raises(BenchmarkError, match=rf"{message}.*choose another --out"):
        open_suite(tmp_path, changed)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "suite.json").write_text("{}")
    with pytest.raises(BenchmarkError, match=r"suite\.json is no record of a suite"):
        read_suite(tmp_path)


def test_other_hardware_or_versions_are_not_mixed_in(tmp_path, pretend, made_up_result):
    pretend()
    write_result(tmp_path, made_up_result(versions={"torch": "1.0"}))
    with pytest.raises(BenchmarkError, match=r"version of torch: 1\.0 there, 2\.13\.0 now"):
        run_suite(tmp_path, SMALL, PHASES)
    write_result(
        tmp_path, made_up_result(hardware={"cpu": "other", "cores": 8, "threads": 4, "gpu": None, "jobs": 7})
    )
    run_suite(tmp_path, SMALL, PHASES)  # another CPU changes losses by rounding alone


def test_budgets_without_a_target_are_explained(tmp_path, pretend, capsys):
    pretend()
    run_suite(tmp_path, SMALL, ("explore",))
    run_suite(tmp_path, replace(SMALL, contenders=(GRIT,)), PHASES)
    said = capsys.readouterr().out
    assert "no budgets on naming: AdamW's best is not known there yet" in said
    assert "adamw, adamw-0.6" in said


def test_a_failure_is_forgotten_where_a_result_has_come_since(tmp_path, made_up_result):
    path = write_result(tmp_path, made_up_result())
    for name in (path.name, "another.json"):
        write_json(tmp_path / FAILED / name, {"error": "OSError: gone"})
    assert read_ledger(tmp_path).failures == {"another.json": "OSError: gone"}
