"""Packed results: what is packed is read as before, nothing is lost, and damage is named."""

import gzip
import subprocess
from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.adapter_size import report as adapter_size_report
from benchmarks.comparison import report
from benchmarks.core import packing
from benchmarks.core.files import REPOSITORY, BenchmarkError, write_json, write_text
from benchmarks.core.packing import PACKED, exists, pack, paths, place, read, unpack
from benchmarks.core.results import RunConfig, is_done, read_result, read_results, write_result
from benchmarks.cost import report as cost_report
from benchmarks.finetune import output
from benchmarks.finetune import report as finetune_report
from benchmarks.suite.folder import read_ledger
from benchmarks.truncation import report as truncation_report

CONFIG = RunConfig("naming", "adamw", 0.01, 0, steps=100, eval_every=50)
ORIGIN = {"versions": {}, "code": {}}
RESULTS = REPOSITORY / "benchmarks" / "results"


def contents(folder):
    """Every file below a folder, by its path there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_lines(folder, *lines):
    (folder / PACKED).write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


def test_round_trip(tmp_path, made_up_result):
    for seed in range(3):
        write_result(tmp_path, made_up_result(seed=seed))
    other = {**ORIGIN, "loss": 0.1 + 0.2, "none": None, "ß": "é\u2028"}
    write_json(tmp_path / "part" / "metrics.json", other)
    before, results = contents(tmp_path), read_results(tmp_path)
    assert pack(tmp_path) == 4
    assert [path.name for path in tmp_path.iterdir()] == [PACKED]
    assert read_results(tmp_path) == results
    assert read(tmp_path / "part" / "metrics.json") == other
    assert unpack(tmp_path) == 4
    assert contents(tmp_path) == before


def test_equal_results_give_equal_bytes(tmp_path, made_up_result):
    packed = []
    for name, seeds in (("a", (0, 1, 2)), ("b", (2, 1, 0))):
        for seed in seeds:
            write_result(tmp_path / name, made_up_result(seed=seed))
        assert pack(tmp_path / name) == 3
        packed.append((tmp_path / name / PACKED).read_bytes())
    assert packed[0] == packed[1]
    assert pack(tmp_path / "a") == 0
    assert (tmp_path / "a" / PACKED).read_bytes() == packed[0]


def test_working_files_and_packed_ones_are_read_together(tmp_path, made_up_result):
    for seed in (0, 2):
        write_result(tmp_path, made_up_result(seed=seed))
    pack(tmp_path)
    write_result(tmp_path, made_up_result(seed=1))
    assert [result["config"]["seed"] for result in read_results(tmp_path)] == [0, 1, 2]
    again = write_result(tmp_path, made_up_result(seed=2, final_loss=1.5))
    assert [result["final_loss"] for result in read_results(tmp_path)] == [2.0, 2.0, 1.5]
    assert pack(tmp_path) == 2
    assert not again.exists()
    assert [result["final_loss"] for result in read_results(tmp_path)] == [2.0, 2.0, 1.5]


def test_what_is_read_is_the_callers_own(tmp_path, made_up_result):
    path = write_result(tmp_path, made_up_result())
    pack(tmp_path)
    read(path)["config"]["lr"] = "changed"
    assert read(path)["config"]["lr"] == 0.01


def test_a_packed_run_is_done(tmp_path, made_up_result):
    path = write_result(tmp_path, made_up_result())
    pack(tmp_path)
    assert is_done(tmp_path, CONFIG, "f" * 64)
    assert not is_done(tmp_path, replace(CONFIG, seed=1), "f" * 64)
    assert list(read_ledger(tmp_path).results) == [path.name]
    with pytest.raises(BenchmarkError, match=rf"in .*{PACKED}; `python -m benchmarks unpack .*other data"):
        is_done(tmp_path, CONFIG, "0" * 64)


def test_a_packed_fine_tuning_run_is_not_run_again(tmp_path):
    write_json(tmp_path / "a" / output.METRICS, {**ORIGIN, "loss": 1.0})
    write_json(tmp_path / "b" / output.METRICS, {**ORIGIN, "loss": 2.0})
    write_text(tmp_path / "b" / "adapter_model.safetensors", "weights")
    assert pack(tmp_path) == 1
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b" / output.METRICS).exists()
    assert paths(tmp_path, f"*/{output.METRICS}") == [tmp_path / name / output.METRICS for name in "ab"]
    assert output.is_finished(tmp_path / "a")
    with pytest.raises(BenchmarkError, match=rf"in .*{PACKED}.*is a finished run; choose another --out"):
        output.check(tmp_path / "a", resume=False, overwrite=False)
    output.check(tmp_path / "c", resume=False, overwrite=False)


def test_a_part_of_a_packed_study_is_read_like_a_folder(tmp_path, made_up_result):
    path = write_result(tmp_path / "part", made_up_result())
    write_result(tmp_path / "part of another", made_up_result(seed=1))
    pack(tmp_path)
    assert not path.parent.exists()
    assert [result["config"]["seed"] for result in read_results(path.parent)] == [0]
    assert paths(tmp_path, "*-seed*.json") == []
    assert is_done(path.parent, CONFIG, "f" * 64)


def test_only_results_are_packed(tmp_path, made_up_result):
    write_result(tmp_path, made_up_result())
    kept = {"suite.json": "{}", "table.json": "[1]", "table.md": "x", "failed/run.json": '{"error": "gone"}'}
    for name, text in kept.items():
        write_text(tmp_path / name, text)
    assert pack(tmp_path) == 1
    assert contents(tmp_path).keys() == {*kept, PACKED}


@pytest.mark.parametrize("stage", ["replace", "unlink"])
def test_an_interrupted_pack_loses_nothing(tmp_path, made_up_result, monkeypatch, stage):
    write_result(tmp_path, made_up_result(seed=9))
    pack(tmp_path)
    for seed in range(3):
        write_result(tmp_path, made_up_result(seed=seed))
    results = read_results(tmp_path)
    with monkeypatch.context() as patch:

        def stop(*arguments, **options):
            raise KeyboardInterrupt

        original = type(tmp_path).unlink
        if stage == "replace":
            patch.setattr(type(tmp_path), "replace", stop)
        else:  # after the first working file is gone
            gone = []

            def unlink(path, missing_ok=False):
                if path.suffix == ".json":
                    if gone:
                        raise KeyboardInterrupt
                    gone.append(path)
                original(path, missing_ok=missing_ok)

            patch.setattr(type(tmp_path), "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path)
    assert read_results(tmp_path) == results
    assert pack(tmp_path) == (3 if stage == "replace" else 2)
    assert read_results(tmp_path) == results
    assert [path.name for path in tmp_path.iterdir()] == [PACKED]


def test_a_file_that_changes_meanwhile_is_kept(tmp_path, made_up_result, monkeypatch):
    path = write_result(tmp_path, made_up_result())
    written = packing.write_with

    def write_and_change(target, write):
        written(target, write)
        monkeypatch.undo()
        write_result(tmp_path, made_up_result(final_loss=0.5))

    monkeypatch.setattr(packing, "write_with", write_and_change)
    with pytest.raises(BenchmarkError, match="changed while it was packed"):
        pack(tmp_path)
    assert read_result(path)["final_loss"] == 0.5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"name": "a.json", "result": 1}', "{"], "is damaged: line 2 is no JSON"),
        (['{"loss": 1}'], "not written by `pack`: line 1 is no name with a result"),
        (["[]"], "line 1 is no name with a result"),
        (['{"name": "../a.json", "result": 1}'], r"line 1 has the name '\.\./a\.json'"),
        (['{"name": "/etc/a.json", "result": 1}'], "line 1 has the name"),
        (['{"name": 3, "result": 1}'], "line 1 has the name 3"),
        (['{"name": "a.json", "result": 1}'] * 2, r"line 2 repeats the name a\.json"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, made_up_result, lines, message):
    path = write_result(tmp_path, made_up_result())
    write_lines(tmp_path, *lines)
    for command in (read_results, pack, unpack):
        with pytest.raises(BenchmarkError, match=rf"{PACKED} .*{message}.*; restore the file"):
            command(tmp_path)
    assert path.exists()
    assert (tmp_path / PACKED).exists()


@pytest.mark.parametrize("change", [lambda d: d[:-9], lambda d: d[:40] + b"\0" + d[41:], lambda d: b"text"])
def test_a_damaged_file_is_named(tmp_path, made_up_result, change):
    path = write_result(tmp_path, made_up_result())
    pack(tmp_path)
    packed = tmp_path / PACKED
    packed.write_bytes(change(packed.read_bytes()))
    for command in (read_results, unpack):
        with pytest.raises(BenchmarkError, match=rf"{PACKED} is damaged \(.*; restore the file"):
            command(tmp_path)
    with pytest.raises(BenchmarkError, match="is damaged"):
        exists(path)


def test_a_damaged_working_file_stops_the_packing(tmp_path, made_up_result):
    path = write_result(tmp_path, made_up_result())
    write_text(tmp_path / "naming-x-seed1.json", "{")
    with pytest.raises(BenchmarkError, match=r"seed1\.json is no JSON .*move it out of the folder"):
        pack(tmp_path)
    assert path.exists()
    assert not (tmp_path / PACKED).exists()


def test_the_commands(tmp_path, made_up_result, capsys):
    write_result(tmp_path / "a", made_up_result())
    write_result(tmp_path / "b", made_up_result())
    assert main(["pack", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert f"{tmp_path / 'b'}: 1 results packed into {PACKED}" in capsys.readouterr().out
    assert main(["pack", str(tmp_path)]) == 2
    assert "pack each study's own folder" in capsys.readouterr().err
    assert main(["unpack", str(tmp_path / "a")]) == 0
    assert main(["unpack", str(tmp_path / "a")]) == 2
    assert f"it has no {PACKED}" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "absent")]) == 2


def test_absent_results(tmp_path):
    assert not exists(tmp_path / "a.json")
    assert place(tmp_path / "a.json") == str(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a.json")
    assert paths(tmp_path / "absent", "*.json") == []


TABLES = {
    "truncation": lambda folder: truncation_report.table(truncation_report.read(folder)[0]),
    "sizes_rounded": lambda folder: adapter_size_report.table(adapter_size_report.read(folder)),
    "qlora": lambda folder: finetune_report.table(finetune_report.read(folder)),
    "main": lambda folder: report.table(read_results(folder)),
    "cost": cost_report.table,
}


@pytest.mark.parametrize(("study", "table"), TABLES.items(), ids=TABLES)
def test_a_packed_studys_table_is_that_of_its_working_files(tmp_path, study, table):
    packed = RESULTS / study / PACKED
    (tmp_path / PACKED).write_bytes(packed.read_bytes())
    assert unpack(tmp_path) > 0
    assert not (tmp_path / PACKED).exists()
    assert table(tmp_path) == table(packed.parent)
    assert pack(tmp_path) > 0
    assert gzip.decompress((tmp_path / PACKED).read_bytes()) == gzip.decompress(packed.read_bytes())


def test_the_results_in_the_repository_are_packed():
    command = ["git", "ls-files", "--", "benchmarks/results"]
    try:
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git repository: which files it holds is unknown")
    kept = listed.split()
    assert 0 < len(kept) < 100
    loose = [name.rpartition("/")[2] for name in kept if name.endswith(".json")]
    assert sorted(loose) == ["fisher.json", "suite.json", "suite.json", "traffic.json", "whole_rows.json"]
