"""The figures of the findings are those of the runs that they name."""

import json
import statistics

import pytest
from evidence import RESULTS, cost_report, final, finals, loss, main_table, read_results, sizes, truncation
from pages import page, row, rows, words

PAGE = page("docs/findings.md")
TEXT = words(PAGE)


def shown(first, *more):
    """The cells after the first ones, of the one row that begins with them."""
    start = [first, *more]
    (found,) = [cells for cells in rows(PAGE) if cells[: len(start)] == start]
    return found[len(start) :]


def lines(file):
    """The records of a file of the prototype."""
    return [json.loads(line) for line in (RESULTS / "prototype" / file).read_text().splitlines()]


# ---------------------------------------------------------------- the prototype

FIXED = {"rule": "muon", "ra": 1.5, "len": "fro", "b1": 0.9, "bl": 0.4, "kp": 0.5, "lr": 0.006}
RULES = {
    "Adam in the factors' eigenbasis": {"rule": "eig", "lr": 0.01, "b1": 0.6},
    "orthogonalised momentum without the tokens' factors": {
        "rule": "muon", "noc": 1, "ra": 1.5, "lr": 0.01, "b1": 0.6,
    },
    "in Fisher coordinates, power 0.5": {"rule": "muon", "kp": 0.5, "ra": 1.5, "lr": 0.01, "b1": 0.6},
    "in Fisher coordinates, power 1": {"rule": "muon", "kp": 1.0, "ra": 1.5, "lr": 0.01, "b1": 0.6},
    "power 0.5, a fixed step length, β₁ = 0.9 with 40 % of the newest gradient": FIXED,
    "the previous row with factors from ∇∇ᵀ": {**FIXED, "grad_fac": 1},
    "the fixed-length rule from a range-finder start": {**FIXED, "rf": 1, "rfs": 0.2, "rfas": 0.05},
}  # fmt: skip


def prototype(task, steps, **rule):
    key = "heldout_in_distribution" if task == "naming" else "heldout_loss"
    (found,) = [
        line[key] for line in lines("runs.jsonl")
        if line["split"] == "second" and line["config"] == {"task": task, "bs": 48, "steps": steps, **rule}
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_prototypes_rules(rule):
    expected = [f"{prototype(task, 36, **RULES[rule]):.3f}" for task in ("naming", "prose")]
    assert shown("36", rule) == expected


def test_the_prototypes_adamw():
    best = [prototype(task, 60, rule="adam", lr=0.01, b1=0.8) for task in ("naming", "prose")]
    assert shown("60", "AdamW, best of β₁ and rates") == [f"{found:.3f}" for found in best]


LENGTHS = {
    "as long as the base's step decreases the loss, at least 0.6": "equal decrease, at least fixed",
    "as long as Adam's step from the mixed average decreases it": "decrease of Adam from the mixed average",
    "as long as Adam's step from the fresh average decreases it": "decrease of Adam from the fresh average",
    "the base's length, and the share of the base's step that lacks": "the base's length, completed",
    "0.6, and the share of the base's step that lacks": "fixed, completed",
    "the previous row with one factor for all matrices": "equal decrease, one factor, at least fixed",
    "the previous row with one factor for all matrices, at least 0.6": (
        "decrease of Adam from the mixed average, one factor, at least fixed"
    ),
}


@pytest.mark.parametrize("row_name", LENGTHS)
def test_the_lengths_that_were_tried(row_name):
    tries = [json.loads(line) for line in (RESULTS / "rates_tries" / "tries.jsonl").read_text().splitlines()]
    expected = [
        f"{one['heldout_loss']:.3f}"
        for lr in (1.25e-3, 1e-2)
        for one in tries
        if (one["task"], one["length"], one["lr"]) == ("naming", LENGTHS[row_name], lr)
    ]
    assert len(expected) == 2
    assert shown(row_name) == expected


BOUNDS = {
    "the longer part": "no longer than the longer part",
    "two orthogonal parts": "no longer than two orthogonal parts",
    "no bound where the newest gradient agrees, else the longer part": (
        "longer where the newest gradient agrees"
    ),
    "no bound where half the slope is left, else the longer part": "longer where half the slope is left",
    "from the longer part to no bound, by the slope that is left": "longer by the slope that is left",
    "**from the longer part to no bound, by twice the slope that is left**": (
        "longer by twice the slope that is left"
    ),
}
COLUMNS = [
    ("prose", 3.125e-4),
    ("signature", 3.125e-4),
    ("prose", 2e-2),
    ("signature", 2e-2),
    ("naming", 2e-2),
    ("naming", 1e-2),
]


def unbounded():
    """Losses by optimizer, task, base and rate."""
    runs = ((run["config"], run["final_loss"]) for run in read_results(RESULTS / "rates_uncapped"))
    return {(one["optimizer"], one["task"], one["base"], one["lr"]): loss for one, loss in runs}


def test_where_the_unbounded_sum_is_above_adamw():
    losses = unbounded()
    pairs = {key[1:] for key in losses if key[0] == "grit"}
    above = {key for key in pairs if losses[("grit", *key)] > losses[("adamw", *key)]}
    assert above == {("prose", "embedded", 0.02), ("signature", "embedded", 0.02)}
    for label, optimizer in (("AdamW", "adamw"), ("no bound", "grit")):
        assert shown(label) == [f"{losses[optimizer, task, 'embedded', lr]:.3f}" for task, lr in COLUMNS]


@pytest.mark.parametrize("row_name", BOUNDS)
def test_the_bounds_that_were_tried(row_name):
    tries = [json.loads(line) for line in (RESULTS / "rates_tries" / "tries.jsonl").read_text().splitlines()]
    losses = {
        (one["task"], one["lr"]): one["heldout_loss"]
        for one in tries
        if one["length"] == f"fixed, completed, {BOUNDS[row_name]}"
    }
    assert shown(row_name) == [f"{losses[key]:.3f}" if key in losses else "–" for key in COLUMNS]


TASKS = ("naming", "prose", "signature", "packages")


def by_source(folder, source, lr, task):
    """Mean final loss of GRIT's runs with factors from that source."""
    found = [
        run["final_loss"]
        for run in read_results(RESULTS / folder)
        for config in (run["config"],)
        if (config["optimizer"], config["task"], config["lr"]) == ("grit", task, lr)
        and config["options"].get("capture", "taps") == source
    ]
    return statistics.fmean(found), len(found)


@pytest.mark.parametrize("source", ["taps", "gradients"])
def test_what_factors_from_gradients_give(source):
    means = [by_source("capture", source, 1e-2, task) for task in TASKS]
    assert shown(f"from {source}") == [f"{mean:.3f}" for mean, _ in means]
    assert {count for _, count in means} == {3}
    for name, lr in (("1/32", 3.125e-4), ("1/8", 1.25e-3), ("2", 2e-2)):
        folder = "rates" if source == "taps" else "capture"
        losses = [f"{by_source(folder, source, lr, task)[0]:.3f}" for task in TASKS]
        assert shown(f"{source}, {name}") == losses


def test_what_they_give_on_a_real_model():
    for folder, source in (("capture", "gradients"), ("rates", "taps")):
        low, best = (by_source(folder, source, lr, "gsm8k")[0] for lr in (2.5e-4, 8e-3))
        assert f"{low:.3f} and {best:.3f} from {source}" in " ".join(TEXT.split())


def test_what_a_step_costs_with_factors_from_gradients():
    costs = {one["optimizer"]: one["ratio"] for one in cost_report.read(RESULTS / "capture_cost", "cost")}
    ours, taps = costs["grit-gradients"], costs["grit"]
    assert "{median:.3f}× AdamW's from gradients (quartiles {q1:.3f} to {q3:.3f})".format(**ours) in TEXT
    assert "{median:.3f}× from taps ({q1:.3f} to {q3:.3f})".format(**taps) in TEXT


def second(**config):
    (found,) = [line["heldout_loss"] for line in lines("second_round.jsonl") if line["config"] == config]
    return found


CHANGES = {
    "none": {"steps": 36},
    "warm-up of 15 steps": {"steps": 36, "warmup": 15},
    "initial A times 4": {"a0": 4.0},
    "singular values shrunk by their noise": {"shrink": 1.0},
    "length as the square of the schedule": {"lr0": 0.01, "decayp": 2.0},
    "constant rate, averaged weights": {"schedule": "const", "ema": 0.85},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_plateau(change):
    assert shown(change) == [f"{second(task=task, **CHANGES[change]):.3f}" for task in ("naming", "prose")]


def test_what_dropping_entries_gives():
    for label, change in (("without", {}), ("with", {"cautious": 1, "caution_floor": 0.3})):
        cells = []
        for task in ("naming", "prose"):
            plain = [{} if seed == 0 and not change else {"seed": seed} for seed in range(3)]
            cells.append(", ".join(f"{second(task=task, steps=60, **change, **seed):.3f}" for seed in plain))
        assert shown(label) == cells


def test_examples_limit_the_runs():
    for task in ("naming", "prose"):
        assert f"{second(task=task, bs=96):.3f} against {second(task=task, steps=60):.3f} on `{task}`" in TEXT


def test_rank_limits_one_task():
    for task in ("naming", "prose"):
        many, few, plain = second(task=task, rank=64), second(task=task, rank=4), second(task=task, steps=36)
        said = f"ank 64 gives {many:.3f}{{}}, rank 16 gives {plain:.3f} and rank 4 gives {few:.3f}"
        assert said.format(" there" if task == "prose" else "") in TEXT


# ---------------------------------------------------------------- runs of the suite's tasks

MOMENTA = {
    "0.9; 0.4 (the default before)": (0.9, None),
    "0.8; 0.5": (0.8, 0.5),
    "0.7; 0.3": (0.7, 0.3),
    "**0.6; 0.4**": (0.6, 0.4),
    "0.5; 0.2": (0.5, 0.2),
}


@pytest.mark.parametrize("label", MOMENTA)
def test_the_momenta(label):
    beta1, share = MOMENTA[label]
    options = {} if share is None else {"caution": 0.7, "gradient_share": share}
    found = [
        final("momentum", seeds=(0, 1), task=task, lr=1e-2, beta1=beta1, steps=60, options=options)
        for task in ("naming", "prose")
    ]
    assert shown(label) == [f"{value:.3f}" for value in found]


def test_the_momentum_at_twice_the_rate():
    found = final("momentum", seeds=(0, 1), task="prose", lr=2e-2, beta1=0.6, steps=60)
    assert shown("0.6; 0.4 at rate 2e-2") == ["–", f"{found:.3f}"]


def test_adamw_gains_nothing_below():
    lower = [final("adamw_beta1_0.4", task=task, beta1=0.4) for task in ("naming", "signature")]
    assert "β₁ = 0.4 gives {:.3f} on `naming` and {:.3f} on `signature`".format(*lower) in TEXT
    assert (
        "0.6 gives {:.3f} and {:.3f}".format(*(loss("adamw-0.6", t) for t in ("naming", "signature"))) in TEXT
    )


def test_the_other_modes():
    def early(optimizer, beta1=0.9, **options):
        return final("first_look", seeds=(0,), optimizer=optimizer, lr=5e-3, beta1=beta1, options=options)

    fresh, stale = early("grit-eigenbasis", kfac_update_freq=2), early("grit-eigenbasis")
    assert f"{fresh:.3f} refreshed every 2 steps, {stale:.3f} every 10, AdamW {early('adamw'):.3f}" in TEXT
    means = [final("batch_16", optimizer=name, lr=5e-3) for name in ("grit", "grit-steer", "adamw")]
    assert 'it has {:.3f}, "steer" {:.3f}, AdamW {:.3f}'.format(*means) in TEXT
    low, chosen, high = early("grit"), early("grit", kfac_damping=0.3), early("grit", kfac_damping=1.0)
    assert (
        f"a damping of 0.3 ({chosen:.3f}) rather than 0.03 ({low:.3f}); 1.0 is no worse ({high:.3f})" in TEXT
    )
    assert f"AdamW with β₁ = 0.6 ({early('adamw', beta1=0.6):.3f})" in TEXT


SHORT = {
    "`caution` 0.5 and `kfac_power` 0.25": {"options": {"caution": 0.5, "kfac_power": 0.25}},
    "`kfac_power` 0": {"options": {"kfac_power": 0.0}},
    "`kfac_power` 1": {"options": {"kfac_power": 1.0}},
    "`kfac_damping` 1.0": {"options": {"kfac_damping": 1.0}},
    "`a_step_ratio` 1.0": {"options": {"a_step_ratio": 1.0}},
    "`a_step_ratio` 2.5": {"options": {"a_step_ratio": 2.5}},
    "`step_length` 0.45": {"options": {"step_length": 0.45}},
    "`step_length` 0.8": {"options": {"step_length": 0.8}},
    "`gradient_share` 0.2": {"options": {"gradient_share": 0.2}},
    "A and B move in turns": {"folder": "short_budgets/steps_in_turns"},
    "momentum rising from 0.5 to 0.9": {"folder": "short_budgets/momentum_rising_from_0.5_to_0.9"},
    "averages carried along as the other matrix moves": {"folder": "short_budgets/momentum_carried"},
}


@pytest.mark.parametrize("label", SHORT)
def test_the_short_budgets(label):
    change = {"folder": "short_budgets", **SHORT[label]}
    cells = []
    for task, lr in (("naming", 1e-2), ("prose", 2e-2)):
        kind = {"seeds": (0, 1, 2), "task": task, "lr": lr}
        difference = final(**change, **kind) - final("short_budgets", **kind)
        cells.append(f"{difference:+.3f}".replace("-", "−").replace("−0.000", "+0.000"))
    assert shown(label) == cells


MOVED = {
    "by the squared entries": "squares",
    "by the token factors": "tokens",
    "exact, from all gradients": "exact",
}


@pytest.mark.parametrize("label", MOVED)
def test_the_moves_of_balanced_coordinates(label):
    found = [
        final(
            f"balanced/{MOVED[label]}_every_{period}",
            seeds=(0,),
            task=task,
            options={"kfac_update_freq": period},
        )
        for task in ("naming", "prose")
        for period in (5, 10, 20)
    ]
    assert shown(label) == [f"{value:.3f}" for value in found]


def test_the_length_from_a_quadratic_model():
    naming, prose = (
        final("quadratic_length/mu_0.003", task="naming"),
        final("quadratic_length/mu_0.0008", task="prose"),
    )
    assert f"{naming:.3f} at 0.003 on `naming`, {prose:.3f} at 0.0008 on `prose`" in TEXT
    for task, best in (("naming", naming), ("prose", prose)):
        fixed = final("momentum", seeds=(0,), task=task, lr=1e-2, beta1=0.9, steps=60)
        assert abs(best - fixed) < 0.006


def test_the_parts_of_the_default():
    def both(part, **options):
        found = [final(f"ablations/{part}", task=task, options=options) for task in ("naming", "prose")]
        return "{:.3f} and {:.3f}".format(*found)

    assert f"the power 0 {both('power_0', kfac_power=0.0)}, no column scale {both('no_column_scale')}" in TEXT
    assert both("no_column_scale_share_0.2", gradient_share=0.2) in TEXT


def test_two_machines_differ_by_rounding():
    here, there = finals("second_machine"), finals("momentum", task="naming", lr=1e-2, beta1=0.9, steps=60)
    assert f"up to {max(abs(a - b) for a, b in zip(here, there, strict=True)):.3f} nats on `naming`" in TEXT


def test_both_sides_keep_more_state():
    state = {name: float(row(main_table(), name)[9].split()[0]) for name in ("soap-rank", "kl-soap", "singd")}
    assert {round(state[name] / state["soap-rank"]) for name in ("kl-soap", "singd")} == {27}
    assert "keep 27 times the state" in TEXT


# ---------------------------------------------------------------- cuts and sizes


def test_what_a_cut_costs():
    (result,) = truncation.read(RESULTS / "truncation")
    for dropped in (1, 2, 4, 8, 12):
        kind = {"method": "balanced", "rank": 16 - dropped}
        points = [p for p in result["points"] if kind.items() <= p.items()]
        (whole,) = [p for p in points if p["site"] == "all"]
        alone = [p for p in points if p["site"] != "all"]
        assert len(alone) == 28
        expected = [whole["predicted"], sum(map(_second, alone)), _second(whole)]
        assert shown(str(dropped)) == [f"{value:.4f}" for value in expected]


def _second(point):
    return point["measured"] - point["first_order"]


def rise(folder, task, seed=0, budget=0.49, way="grit, rank_budget", whole="sizes_before_momentum"):
    """How far a way ends above the whole adapter of the same seed, in per cent."""
    series = sizes.read(RESULTS / folder)[task][0]
    labels = [label for label in series if label.partition(" (rank")[0] == way]
    (point,) = [p for label in labels for p in series[label].get(budget, []) if p["seed"] == seed]
    (before,) = [p for p in sizes.read(RESULTS / whole)[task][0][sizes.WHOLE][1.0] if p["seed"] == seed]
    return 100 * (point["heldout"] / before["heldout"] - 1)


BEFORE, ALL = "sizes_before_momentum", ("prose", "signature", "packages")
CUTS = {
    "approached from step 20 to 50 of 60": (BEFORE, ALL),
    "approached from step 40 on, which ends at 45 % fewer bytes": ("sizes_tries/cut_from_40_to_55", ALL),
    "all at once at step 50": ("sizes_tries/one_cut_at_50", ALL),
    "after the last step": (BEFORE, ALL),
    "of 120 steps, from 40 to 100": ("sizes_tries/120_steps", ALL[:2]),
}


@pytest.mark.parametrize("label", CUTS)
def test_when_to_cut(label):
    folder, tasks = CUTS[label]
    way = "grit, cut after training" if label == "after the last step" else sizes.OURS
    whole = folder if "120" in label else BEFORE
    found = [f"{rise(folder, task, way=way, whole=whole):+.2f} %" for task in tasks]
    assert shown(label) == found + ["–"] * (len(ALL) - len(tasks))


def test_longer_steps_for_the_ranks_that_stay():
    for task in ("prose", "naming", "signature"):
        short, long = (
            rise("sizes_tries/first_over_rank_to_0", task, 1),
            rise(BEFORE, task, 1),
        )
        assert f"{short:+.2f} to {long:+.2f} %" in TEXT


def test_the_allocations():
    found = {}
    for line in (RESULTS / "sizes_tries" / "allocations.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["allocation"], {})[record["task"]] = record["heldout_rise_percent"]
    assert len(found) == 11
    first = found["common budget: loss per parameter"]
    said = (
        f"loss per parameter {first['packages']:+.1f} % on `packages` and {first['prose']:+.2f} % on `prose`"
    )
    assert said in TEXT
    for name, start in (("rank 8 everywhere", "rank 8"), ("loss whatever the size", "loss, whatever")):
        (rises,) = [rises for allocation, rises in found.items() if allocation.startswith(start)]
        assert f"{name} {rises['packages']:+.1f} % and {rises['prose']:+.2f} %" in TEXT


def test_other_changes_of_the_cut():
    for words_before, folder in (
        ("growing ranks back", "regrowth"),
        ("(r₀/r to the power 1.5)", "first_over_rank_to_1.5"),
        ("a higher rate", "rate_0.014"),
        ("prices per root of the size", "loss_per_root_of_the_size"),
    ):
        assert f"{words_before} {rise(f'sizes_tries/{folder}', 'prose'):+.2f} %" in TEXT


def test_the_cut_after_training_with_the_momentum_of_now():
    series = sizes.read(RESULTS / "sizes")["packages"][0]
    now = 100 * sizes.against_whole(series, series["grit, cut after training"][0.49])[1]
    before = sizes.read(RESULTS / "sizes_before_momentum")["packages"][0]
    then = 100 * sizes.against_whole(before, before["grit, cut after training"][0.49])[1]
    assert f"({now:+.2f} instead of some 30 %)" in TEXT
    assert 25 < then < 35


def test_what_changes_little_with_the_momentum_of_now():
    whole = sizes.read(RESULTS / "sizes")

    def changes(folder, base, budget):
        """By task, how far the runs of a folder end above those of `sizes`, in per cent."""
        found = {}
        for task, (series, _) in sizes.read(RESULTS / "sizes_tries" / folder).items():
            before = {p["seed"]: p["heldout"] for p in whole[task][0][base][budget]}
            points = [p for budgets in series.values() for each in budgets.values() for p in each]
            found[task] = [100 * (p["heldout"] / before[p["seed"]] - 1) for p in points]
        return found

    later = changes("later_budget", sizes.OURS, 0.49)["naming"]
    assert f"worse by {min(later):.1f} to {max(later):.1f} % on `naming`" in TEXT
    small = [changes("least_rank", sizes.OURS, 0.49), changes("balanced_at_full_rank", sizes.WHOLE, 1.0)]
    rises = [rise for tasks in small for rises in tasks.values() for rise in rises]
    assert len(rises) >= 8
    assert f"change {max(map(abs, rises)):.1f} % or less" in TEXT
