"""Tables and figures against computation by hand on made-up results."""

import math

import pytest

from benchmarks.comparison.report import report, table
from benchmarks.comparison.summary import Cell, comparable, first_crossing, methods, reference_cell, rows
from benchmarks.core.results import write_result


@pytest.fixture
def study(made_up_result):
    """AdamW with 2 rates and 2 seeds, grit with 3 rates, one of which diverges at one seed."""
    fast = ((0, 0.0, 5.0), (50, 20.0, 2.5), (100, 40.0, 1.5))
    slow = ((0, 0.0, 5.0), (50, 20.0, 4.0), (100, 40.0, 3.0))
    burst = {
        "diverged": True,
        "final_loss": None,
        "exact_match": None,
        "curve": ((0, 0.0, 5.0),),
    }
    grit = {"step_seconds_median": 0.3, "optimizer_state_bytes": 3_000_000}
    return [
        made_up_result("adamw", 0.01, 0, exact_match=0.10),
        made_up_result(
            "adamw", 0.01, 1, ((0, 0.0, 5.0), (50, 10.0, 3.4), (100, 20.0, 2.2)), exact_match=0.20
        ),
        made_up_result("adamw", 0.005, 0, ((0, 0.0, 5.0), (50, 10.0, 3.0), (100, 20.0, 2.8))),
        made_up_result("adamw", 0.005, 1, ((0, 0.0, 5.0), (50, 10.0, 3.0), (100, 20.0, 2.8))),
        made_up_result("grit", 0.005, 0, slow, **grit),
        made_up_result("grit", 0.01, 0, fast, **grit),
        made_up_result("grit", 0.02, 0, fast, **grit),
        made_up_result("grit", 0.02, 1, **burst),
    ]


def test_rows_against_a_computation_by_hand(study):
    adamw, grit = rows(methods(study))
    assert (adamw.method.label, grit.method.label) == ("adamw", "grit")
    assert adamw.best.lr == 0.01
    assert adamw.best.loss == pytest.approx(2.1)
    assert adamw.best.spread == pytest.approx(0.2 / math.sqrt(2))
    assert adamw.best.mean("exact_match") == pytest.approx(0.15)
    assert (adamw.steps_ratio, adamw.seconds_ratio, adamw.step_time_ratio) == pytest.approx((1.0, 1.0, 1.0))
    # From 2.5 at step 50 (20 s) down to 1.5 at step 100 (40 s): 2.1 is reached at step 70, after 28 s.
    assert grit.best.lr == 0.01  # 0.02 is as good but has a diverged seed
    assert grit.steps_ratio == pytest.approx(0.7)
    assert grit.seconds_ratio == pytest.approx(28 / 20)
    assert grit.step_time_ratio == pytest.approx(1.5)


def test_best_rate_at_the_end_of_the_grid_is_marked(study):
    adamw, grit = methods(study)
    assert (adamw.remark, grit.remark) == ("edge of grid", "")
    assert methods(study[:2])[0].remark == "single rate"


def test_table_shows_numbers_and_diverged_runs(study):
    lines = table(study).splitlines()
    assert (
        "| adamw | 0.01 (edge of grid) | 2.100 ± 0.141 (n=2) | 2.500 | 15.0 % | 1.00× | 1.00× | 1.00× | 2.00 "
        "MB |" in lines
    )
    assert "| grit | 0.01 | 1.500 (n=1) | 2.500 | 25.0 % | 0.70× | 1.40× | 1.50× | 3.00 MB |" in lines
    assert "- grit at 0.02: 1 of 2 runs diverged" in lines


def test_a_method_that_only_diverges_is_shown(study):
    alone = [*study[:4], study[-1]]
    assert "| grit | none of 0.02 | diverged | – | – | – | – | – | – |" in table(alone).splitlines()


def test_a_method_that_never_gets_there(study):
    assert (
        "| grit | 0.005 (single rate) | 3.000 (n=1) | 2.500 | 25.0 % | not reached | not reached | 1.50×"
        in table(study[:5])
    )


def test_without_adamw_there_are_no_ratios(study):
    text = table(study[4:7])
    assert reference_cell(methods(study[4:7])) is None
    assert "| grit | 0.01 | 1.500 (n=1) | 2.500 | 25.0 % | – | – | – | 3.00 MB |" in text
    assert "nothing to take ratios to" in text


def test_settings_that_vary_are_methods_of_their_own(made_up_result):
    results = [
        made_up_result(),
        made_up_result(curve=((0, 0.0, 5.0), (50, 10.0, 2.5), (100, 20.0, 1.8)), config={"beta1": 0.6}),
    ]
    found = {row.method.label: row for row in rows(methods(results))}
    assert set(found) == {"adamw (beta1=0.9)", "adamw (beta1=0.6)"}
    assert reference_cell(methods(results)).loss == pytest.approx(
        1.8
    )  # AdamW's best is taken over its settings
    assert found["adamw (beta1=0.9)"].steps_ratio is None


@pytest.mark.parametrize(
    ("target", "expected"), [(6.0, 0.0), (4.0, 5.0), (3.0, 10.0), (2.5, 17.5), (1.9, None)]
)
def test_first_crossing(target, expected):
    found = first_crossing([0.0, 10.0, 15.0, 20.0], [5.0, 3.0, 3.0, 2.0], target)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("change", "heading"),
    [
        ({"fingerprint": "0" * 64}, "data and model: 0000000000000000"),
        (
            {"hardware": {"cpu": "other", "cores": 2, "threads": 2, "gpu": None, "jobs": 1}},
            "hardware cpu: other",
        ),
        ({"config": {"steps": 7}}, "steps: 7"),
        ({"versions": {"torch": "9.9"}}, "version of torch: 9.9"),
    ],
)
def test_what_does_not_belong_together_gets_its_own_table(tmp_path, made_up_result, change, heading):
    for result in (made_up_result(), made_up_result("grit", 0.02, **change)):
        write_result(tmp_path, result)
    text = report(tmp_path)
    assert text.startswith("These runs are not all comparable, so they stand in 2 tables.")
    assert sorted(line for line in text.splitlines() if heading in line) == [
        line for line in text.splitlines() if line.startswith("### Table") and heading in line
    ]
    assert text.count("### Table") == 2
    one, two = text.split("### Table")[1:]
    assert ("| adamw |" in one) != ("| adamw |" in two)
    assert ("| grit |" in one) != ("| grit |" in two)
    assert len(list(tmp_path.glob("curves-*.png"))) == 2


def test_seeds_and_rates_belong_together(study):
    ((difference, results),) = comparable(study)
    assert difference == {}
    assert len(results) == len(study)


def test_report_writes_what_it_prints(tmp_path, study, capsys):
    for result in study:
        write_result(tmp_path, result)
    text = report(tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    assert text in capsys.readouterr().out
    for name in ("curves.png", "learning_rates.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_figures_of_runs_that_all_diverged(tmp_path, study):
    write_result(tmp_path, study[-1])
    report(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "learning_rates.png").exists()


def test_unseen_loss_is_only_given_within_one_epoch(made_up_result):
    """Beyond it, a training batch has been trained on before."""
    cells = [Cell(0.01, (made_up_result(epochs=epochs),)) for epochs in (1.0, 1.01)]
    assert cells[0].unseen_loss == 2.5
    assert cells[1].unseen_loss is None
    assert Cell(0.01, (made_up_result(train_losses=[3.0] * 50),)).unseen_loss is None, (
        "nothing after the first point"
    )
