"""The page of results shows the tables that were printed, and what it says of them follows from the runs."""

import statistics

import pytest
from evidence import (
    PEERS,
    RESULTS,
    TASKS,
    comparable,
    comparison_table,
    final,
    loss,
    main_table,
    part,
    read_results,
    target,
    trials,
)
from pages import page, row, rows, words

from benchmarks.rates import report as rates

PAGE = page("docs/results.md")
TEXT = words(PAGE)
GAPS = part("Loss less that of AdamW's best, seed by seed:")
STEPS = part("Steps to AdamW's best, task by task:")


def gaps(label):
    """Mean and standard deviation of the differences from AdamW's best, by task."""
    cells = [cell.replace("−", "-").split(" ± ") for cell in row(GAPS, label)[1:]]
    return [(float(mean), float(deviation)) for mean, deviation in cells]


def test_the_tables_are_the_ones_that_were_printed():
    assert main_table() in PAGE
    assert part("Targets (AdamW's best):") in PAGE
    for table, least in ((GAPS, 6), (STEPS, 8)):
        shown = [line for line in table.splitlines()[2:] if line in PAGE]
        assert len(shown) >= least
        assert "\n".join([*table.splitlines()[:2], *shown]) in PAGE


def test_the_main_jobs_table_is_the_one_that_was_printed():
    folder = RESULTS / "main"
    ((_, results),) = comparable(read_results(folder))
    printed = comparison_table(results).strip()
    assert (folder / "table.md").read_text(encoding="utf8").strip() == printed
    assert printed.partition("\n\n")[0] in PAGE
    assert words(printed) in TEXT


def test_grit_is_below_every_adamw_by_four_deviations():
    assert all(mean < 0 and -mean >= 4 * deviation for mean, deviation in gaps("grit"))


def test_grit_is_below_every_other_contender_but_for_a_tie():
    labels = [cells[0] for cells in rows(main_table())[2:] if cells[0] != "grit"]
    behind = {(label, task): loss(label, task) - loss("grit", task) for label in labels for task in TASKS}
    nearest = min(behind, key=behind.get)
    assert nearest == ("muon-0.6", "prose")
    assert abs(behind.pop(nearest)) < 0.001
    assert min(behind.values()) > 0.003
    muon = [behind["muon-0.6", task] for task in TASKS if task != "prose"]
    assert f"It is {min(muon):.3f} to {max(muon):.3f} nats behind on the other three" in TEXT


def test_the_steps_are_the_tables():
    ratios = dict(zip(TASKS, [cell.partition("×")[0] for cell in row(STEPS, "grit")[1:]], strict=True))
    assert rows(STEPS)[0][1:] == list(TASKS)
    whole = row(main_table(), "grit")
    assert f"in {whole[6].partition('×')[0]} of AdamW's steps" in TEXT
    assert f"{ratios['packages']} on `packages` to {ratios['signature']} on `signature`" in TEXT
    assert (min(ratios.values()), max(ratios.values())) == (ratios["packages"], ratios["signature"])
    assert f"In seconds that is {whole[7].partition('×')[0]}." in TEXT


def test_nothing_need_be_retuned():
    """At the rate that is best for AdamW with β₁ = 0.9, GRIT is below AdamW's best of all settings."""
    there = []
    for task in TASKS:
        adamw, grit = trials()["adamw", task], trials()["grit", task]
        assert grit.contender.rate(adamw.best) == adamw.contender.rate(adamw.best)
        runs = grit.configs(adamw.best, grit.settings.steps)
        assert len(runs) == 3
        there.append((task, grit.ledger.mean(runs)))
        assert there[-1][1] < target(task)
    assert ", ".join(f"{found:.3f} on `{task}`" for task, found in there) in TEXT


@pytest.mark.parametrize("label", ["soap-rank", "kl-soap", "lorarite"])
def test_lower_momentum_is_a_gain_of_its_own(label):
    assert all(mean < 0 for mean, _ in gaps(f"{label}-0.6"))
    assert not all(mean < 0 for mean, _ in gaps(label))


def test_with_the_bases_momentum_grit_needs_more_steps():
    """The shortest budget whose mean over the seeds reaches AdamW's best, mean of the tasks."""
    configs, shortest = [run["config"] for run in read_results(RESULTS / "momentum")], []
    for task in TASKS:
        kind = {"task": task, "lr": 5e-3 if task == "signature" else 1e-2, "beta1": 0.9, "options": {}}
        budgets = {config["steps"] for config in configs if kind.items() <= config.items()}
        reached = [n for n in budgets if final("momentum", (0, 1, 2), steps=n, **kind) <= target(task)]
        shortest.append(min(reached) / 60)
    assert f"With the base's 0.9 it needed {statistics.fmean(shortest):.2f} of AdamW's steps" in TEXT


def test_the_rank_side_is_enough():
    plain = [loss("kl-soap", task) - loss("soap-rank", task) for task in TASKS]
    fresh = {task: loss("kl-soap-0.6", task) - loss("soap-rank-0.6", task) for task in TASKS}
    assert max(map(abs, plain)) < 0.0055
    assert f"{-fresh['prose']:.3f} nats below it on `prose`" in TEXT
    assert f"{fresh['packages']:.3f} above it on `packages`" in TEXT
    assert max(abs(fresh["naming"]), abs(fresh["signature"])) < 0.005
    assert all(loss("soap-full", task) > loss("soap-rank", task) for task in TASKS)
    state = {label: row(main_table(), label)[9] for label in ("soap-full", "kl-soap", "soap-rank")}
    assert state == {"soap-full": "71.12 MB", "kl-soap": "71.12 MB", "soap-rank": "2.61 MB"}
    assert "keep 71 MB of state, SOAP on the rank side 2.6 MB" in TEXT


def test_no_best_rate_lies_at_the_end_of_its_grid():
    rates = part("Best learning rates:")
    assert len(rates.splitlines()) > 20
    assert "end of the rates tried" not in rates
    assert PEERS.joinpath("table.md").read_text(encoding="utf8").count(rates) == 1


# ---------------------------------------------------------------- at any learning rate


def by_rate(results):
    """{optimizer: loss} at each learning rate."""
    losses = {}
    for result in results:
        config = result["config"]
        losses.setdefault(config["lr"], {})[config["optimizer"]] = result["final_loss"]
    return losses


def pairs_of_rates():
    """(AdamW's loss, GRIT's loss) at each learning rate of each panel."""
    panels = map(by_rate, rates.panels_of(RESULTS / "rates"))
    return [(one["adamw"], one["grit"]) for panel in panels for one in panel.values()]


def test_the_tables_of_the_rates_are_those_that_were_printed():
    printed = (RESULTS / "rates" / rates.TABLE).read_text(encoding="utf8")
    assert printed == rates.text_of(rates.panels_of(RESULTS / "rates"))
    tables = printed.split("### ")[1:]
    assert len(tables) >= 5
    for table in tables:
        title, _, body = table.partition("\n\n")
        assert f"### {title}\n\n{body.partition(chr(10) * 2)[0].strip()}" in PAGE


def test_grit_is_below_adamw_at_every_rate():
    pairs = pairs_of_rates()
    assert all(grit < adamw for adamw, grit in pairs)
    least = min(adamw - grit for adamw, grit in pairs)
    assert f"below AdamW in all {len(pairs)} pairs, by {least:.3f} nats or more" in TEXT


# ---------------------------------------------------------------- with another rank or alpha


def carried():
    """{optimizer: loss} by (rank, alpha) and learning rate."""
    return {
        (panel[0]["config"]["rank"], panel[0]["config"]["alpha"]): by_rate(panel)
        for panel in rates.panels_of(RESULTS / "rates_carried")
    }


def test_the_table_of_ranks_and_alphas_is_what_was_printed():
    folder = RESULTS / "rates_carried"
    groups = rates.panels_of(folder)
    assert (folder / rates.TABLE).read_text(encoding="utf8") == rates.text_of(groups)
    assert rates.best_rates(groups) in PAGE


def test_alpha_moves_the_best_rate_and_rank_does_not():
    best = {
        setting: {name: min(losses, key=lambda lr: losses[lr].get(name, 9.0)) for name in ("adamw", "grit")}
        for setting, losses in carried().items()
    }
    assert all(one["grit"] == one["adamw"] for one in best.values())
    assert best[64, 16] == best[16, 16]
    assert [best[16, alpha]["grit"] for alpha in (4, 16, 64)] == [0.02, 0.01, 0.005]
    assert best[64, 64] == best[16, 64]


def test_what_a_step_without_alpha_would_be_is_worse_than_adamw():
    losses = carried()[16, 4]
    assert losses[0.04]["grit"] > losses[0.02]["adamw"]
    assert f"ends at {losses[0.04]['grit']:.3f}; AdamW has {losses[0.02]['adamw']:.3f} there" in TEXT


def test_the_one_pair_where_grit_is_above_is_said():
    above = {
        (*setting, lr): one["grit"] - one["adamw"]
        for setting, losses in carried().items()
        for lr, one in losses.items()
        if one["grit"] >= one["adamw"]
    }
    assert list(above) == [(64, 64, 0.01)]
    assert f"GRIT is {above[64, 64, 0.01]:.3f} above it" in TEXT
