"""Loss against the learning rate: the table against numbers by hand, and what is refused."""

import pytest

from benchmarks.__main__ import main
from benchmarks.core.files import BenchmarkError
from benchmarks.core.results import write_result
from benchmarks.rates.report import report
from benchmarks.rates.study import SHARES, holds


def ends_at(loss):
    return ((0, 0.0, 5.0), (50, 10.0, 3.0), (100, 20.0, loss))


@pytest.fixture
def results(made_up_result):
    burst = {"diverged": True, "final_loss": None, "exact_match": None, "curve": ((0, 0.0, 5.0),)}
    return [
        made_up_result("adamw", 0.00125, 0, ends_at(2.9)),
        made_up_result("adamw", 0.01, 0, ends_at(2.5)),
        made_up_result("adamw", 0.02, 0, ends_at(4.9)),
        made_up_result("grit", 0.00125, 0, ends_at(2.95)),
        made_up_result("grit", 0.01, 0, ends_at(2.25)),
        made_up_result("grit", 0.02, 0, **burst),
    ]


def test_each_rate_has_a_row_with_both_losses_and_their_difference(results, tmp_path):
    for result in results:
        write_result(tmp_path, result)
    text = report(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| 0.")]
    assert rows == [
        "| 0.00125 | 0.125× | 2.900 | 2.950 | +0.050 |",
        "| 0.01 | 1× | 2.500 | 2.250 | −0.250 |",
        "| 0.02 | 2× | 4.900 | diverged | – |",
    ]
    assert (tmp_path / "rates.md").read_text() == text
    assert (tmp_path / "rates.png").stat().st_size > 5000
    assert holds(tmp_path)


def test_models_tasks_and_lengths_have_panels_of_their_own(results, tmp_path):
    for result in results:
        write_result(tmp_path, result)
        for change in ({"task": "prose"}, {"steps": 300}, {"base": "smollm2", "adapted_layers": 8}):
            write_result(tmp_path, {**result, "config": {**result["config"], **change}})
    headings = [line for line in report(tmp_path).splitlines() if line.startswith("### ")]
    steps = results[0]["config"]["steps"]
    assert headings == [
        f"### naming, {steps} steps",
        "### naming, 300 steps",
        f"### naming, smollm2 (last 8 layers), {steps} steps",
        f"### prose, {steps} steps",
    ]


def test_settings_are_told_apart_and_their_best_rates_stand_first(results, tmp_path):
    for result in results:
        write_result(tmp_path, result)
    wider = {"rank": 64, "alpha": 16, "batch_size": 8}
    ends = {("adamw", 0.00125): 2.7, ("adamw", 0.01): 2.4, ("grit", 0.00125): 2.3, ("grit", 0.01): 2.2,
            ("grit", 0.04): 2.1}  # fmt: skip
    for (optimizer, lr), loss in ends.items():
        made = dict(results[0], config={**results[0]["config"], "optimizer": optimizer, "lr": lr, **wider})
        write_result(tmp_path, {**made, "final_loss": loss})
    steps = results[0]["config"]["steps"]
    assert report(tmp_path).splitlines()[:4] == [
        "| setting | adamw's best rate | loss | grit's best rate | loss | factors of 2 between |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| naming, {steps} steps | 0.01 | 2.500 | 0.01 | 2.250 | 0 |",
        f"| naming, {steps} steps, r = 64, alpha = 16, batches of 8 | 0.01 (at an end) | 2.400 "
        "| 0.04 (at an end) | 2.100 | +2 |",
    ]


def test_a_folder_without_both_optimizers_is_refused(results, tmp_path):
    for result in results[:3]:
        write_result(tmp_path, result)
    with pytest.raises(
        BenchmarkError, match=r"naming, .*: one adamw and one other optimizer .* found: adamw"
    ):
        report(tmp_path)
    assert not (tmp_path / "rates.md").exists()


def test_rates_go_from_a_thirty_second_of_the_best_to_twice_the_best(monkeypatch, tmp_path, capsys):
    planned = []
    monkeypatch.setattr("benchmarks.rates.study.grid.run", planned.append)
    monkeypatch.setattr("benchmarks.rates.study.report", lambda folder: None)
    assert main(["rates", "--best", "8e-3", "--out", str(tmp_path)]) == 0
    assert main(["rates", "--lrs", "1e-3,2e-3", "--out", str(tmp_path)]) == 0
    assert planned[0].optimizers == ["adamw", "grit"]
    assert (SHARES[0], SHARES[-1]) == (1 / 32, 2)
    assert planned[0].lrs == pytest.approx([2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    assert planned[1].lrs == [1e-3, 2e-3]
