"""Tables of a suite in Markdown."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..comparison.summary import Result, described_model
from ..core.bootstrap import RESAMPLES, Interval
from ..peers.registry import PEERS
from .folder import Suite
from .summary import Entry, Standing, entries
from .sweep import Ledger, reference

_LEGEND = (
    "Loss: final held-out loss in nats per token at the contender's best learning rate and the full budget, "
    "mean over n seeds ± their standard deviation. Learning rates: a grid of factor 2, searched with one "
    "seed and decided by the mean over all.",
    "Less that of AdamW's best: mean over the seeds of the difference at the same seed ± its standard "
    "deviation. At one seed all have the same initial adapter and batches, which make much of the spread of "
    "the losses themselves.",
    "Steps: AdamW's lowest mean loss over its settings is the target; every contender is run again at its "
    "best rate with shorter budgets, the schedule shortened with them, and the ratio is the shortest budget "
    "that reaches the target over the full one, found by bisection from {shortest:.2f} on, and below that "
    "one by one (where noise makes the loss rise with the budget, another short budget may reach it too). A "
    "contender that misses it at the full budget is tried up to {longest:.2f} of it. 1.00× for AdamW itself "
    "means that no shorter budget of the grid reached its own loss.",
    "In brackets: the same ratio on straight lines between the measured budgets (the ratio itself is rounded "
    "up to the grid of {grid:.0%}), and its 95 % bootstrap interval over the seeds ({resamples:,} resamples, "
    "the same seeds drawn for contender and target). {few}",
    "Seconds: steps × the median of the step time. Step time: against plain AdamW in turns, alone on the "
    "machine, task {task}, {threads} threads, median (quartiles), load of the machine before at most {load}; "
    "the training runs' own times are not used. State: bytes of tensors in the optimizer's state, mean over "
    "the runs.",
)


def _loss(standing: Standing) -> str:
    if standing.trial.loss is None:
        return "–"
    spread = "" if standing.spread is None else f" ± {standing.spread:.3f}"
    return f"{standing.trial.loss:.3f}{spread} (n={len(standing.losses)})"


def _end(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not reached"


def _interval(interpolated: float | None, found: Interval | None) -> str:
    """In brackets, the interpolated ratio and its interval."""
    if interpolated is None:
        return ""
    return f" ({_end(interpolated)}" + (f"; {_end(found.low)} to {_end(found.high)})" if found else ")")


def _steps(standing: Standing) -> str:
    """The steps ratio on one task."""
    ratio = standing.steps_ratio
    if ratio is None:
        return "–"
    if math.isinf(ratio):
        sizes = standing.trial.settings
        return f"not reached up to {sizes.budgets()[-1] / sizes.steps:.2f}"
    limit = "≤ " if standing.search and standing.search.at_limit else ""
    return f"{limit}{ratio:.2f}×{_interval(standing.interpolated, standing.interval)}"


def _mean_steps(entry: Entry) -> str:
    if entry.steps_ratio is None:
        return "–"
    if entry.at_least is not None:
        missed = sum(1 for one in entry.standings if math.isinf(one.steps_ratio or 0.0))
        return f"> {entry.at_least:.2f}× (not reached on {missed} of {len(entry.standings)})"
    limit = "≤ " if any(one.search and one.search.at_limit for one in entry.standings) else ""
    return f"{limit}{entry.steps_ratio:.2f}×{_interval(entry.interpolated, entry.interval)}"


def _seconds(entry: Entry) -> str:
    if entry.seconds_ratio is None:
        return "–"
    if entry.at_least is not None and entry.step_time:
        return f"> {entry.at_least * entry.step_time['median']:.2f}×"
    return f"{entry.seconds_ratio:.2f}×"


def _step_time(entry: Entry) -> str:
    time = entry.step_time
    return f"{time['median']:.2f}× ({time['q1']:.2f} to {time['q3']:.2f})" if time else "–"


def _betas(entry: Entry) -> str:
    peer = PEERS.get(entry.contender.optimizer)
    if peer and "betas" not in peer.uses:
        return "–"
    return f"{entry.contender.beta1:g}, {entry.contender.beta2:g}"


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _main_table(found: Sequence[Entry], tasks: Sequence[str]) -> str:
    header = [
        "optimizer",
        "β₁, β₂",
        *(f"{task}: loss" for task in tasks),
        "steps to AdamW's best",
        "seconds to it",
    ]
    lines = [
        [
            entry.contender.label,
            _betas(entry),
            *map(_loss, entry.standings),
            _mean_steps(entry),
            _seconds(entry),
            _step_time(entry),
            "–" if entry.state_bytes is None else f"{entry.state_bytes / 1e6:.2f} MB",
            "; ".join(entry.remarks),
        ]
        for entry in found
    ]
    return _grid([*header, "step time", "optimizer state", "remarks"], lines)


def _steps_table(found: Sequence[Entry], tasks: Sequence[str]) -> str:
    lines = [[entry.contender.label, *map(_steps, entry.standings)] for entry in found]
    return "Steps to AdamW's best, task by task:\n\n" + _grid(["optimizer", *tasks], lines)


def _gap(standing: Standing) -> str:
    """The mean of the gaps and their standard deviation."""
    gaps = standing.gaps
    if not gaps:
        return "–"
    spread = f" ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.3f}{spread}".replace("-", "−")


def _gaps_table(found: Sequence[Entry], tasks: Sequence[str]) -> str:
    lines = [[entry.contender.label, *map(_gap, entry.standings)] for entry in found]
    return "Loss less that of AdamW's best, seed by seed:\n\n" + _grid(["optimizer", *tasks], lines)


def _rate(standing: Standing) -> str:
    if standing.lr is None:
        return "–"
    edge = " (end of the rates tried)" if standing.trial.settled and standing.trial.settled.edge else ""
    return f"{standing.lr:g}{edge}"


def _rates_table(found: Sequence[Entry], tasks: Sequence[str]) -> str:
    lines = [[entry.contender.label, *map(_rate, entry.standings)] for entry in found]
    return "Best learning rates:\n\n" + _grid(["optimizer", *tasks], lines)


def _target_lines(suite: Suite, ledger: Ledger) -> str:
    lines = []
    for task in suite.tasks:
        best = reference(suite.trials(ledger), task)
        if best is None or best.best is None:
            lines.append(
                f"- {task}: no target, because AdamW's runs are not finished here; steps are not counted"
            )
        else:
            lines.append(
                f"- {task}: {best.loss:.4f} nats per token, by {best.contender.label} (β "
                f"{best.contender.beta1:g}, {best.contender.beta2:g}) at learning rate "
                f"{best.contender.rate(best.best):g}"
            )
    return "Targets (AdamW's best):\n\n" + "\n".join(lines)


def _few_seeds(count: int) -> str:
    if count < 2:
        return "With one seed there is no interval."
    draws = math.comb(2 * count - 1, count)
    return (
        f"{count} seeds give only {draws} different resamples: the interval shows how far the result hangs "
        "on single seeds, but it is no calibrated 95 % statement, tends to be too narrow, and does not cover "
        "the choice of the learning rate."
    )


def _legend(suite: Suite, costs: Mapping[str, Mapping[str, Any]]) -> str:
    sizes = suite.settings
    threads = sorted({str(cost["hardware"]["threads"]) for cost in costs.values()}) or ["no"]
    loads = [cost["hardware"].get("load_average_before") for cost in costs.values()]
    known = [load for load in loads if load is not None]
    return "\n\n".join(_LEGEND).format(
        longest=sizes.longest_budget,
        shortest=sizes.shortest_budget,
        resamples=RESAMPLES,
        grid=sizes.budget_grid,
        few=_few_seeds(len(sizes.seeds)),
        task=suite.tasks[0],
        threads="/".join(threads),
        load=f"{max(known):.1f}" if known else "unknown",
    )


def _machine(hardware: Mapping[str, Any]) -> str:
    return hardware["gpu"] or f"{hardware['cpu']} ({hardware['threads']} threads a run)"


def _origin(suite: Suite, results: Sequence[Result]) -> str:
    """Where the numbers come from: sizes, hardware, commits, packages of the peers."""
    sizes, machines = suite.settings, sorted({_machine(result["hardware"]) for result in results})
    commits = Counter((result.get("code") or {}).get("commit") or "unknown" for result in results)
    dirty = (
        " (some with uncommitted changes)" if any((r.get("code") or {}).get("dirty") for r in results) else ""
    )
    packages = {
        name: version
        for result in results
        for name, version in (result.get("optimizer_package") or {}).items()
    }
    peers = (
        "; " + ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
        if packages
        else ""
    )
    data = {result["config"]["task"]: result["fingerprint"][:12] for result in results}
    return (
        f"{len(results)} runs; full budget {sizes.steps} steps of {sizes.batch_size} examples, seeds "
        f"{', '.join(map(str, sizes.seeds))}; {described_model(sizes.base, sizes.adapted_layers)}; data "
        f"{', '.join(f'{task} {name}' for task, name in sorted(data.items()))}; {sizes.precision} on "
        f"{' and '.join(machines)}; commit {', '.join(name[:12] for name in commits)}{dirty}; torch "
        f"{results[0]['versions'].get('torch')}{peers}."
    )


def table(suite: Suite, ledger: Ledger, costs: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown of one group of comparable results."""
    everybody = entries(suite.trials(ledger), costs)
    found = [entry for entry in everybody if entry.is_started]
    waiting = [entry.contender.label for entry in everybody if not entry.is_started]
    mixed = [f"{entry.contender.label} ({entry.commits})" for entry in found if entry.commits > 1]
    parts = [
        _main_table(found, suite.tasks),
        *([f"Not run yet: {', '.join(waiting)}."] if waiting else []),
        *([f"Losses from runs of more than one commit of the project: {', '.join(mixed)}."] if mixed else []),
        _target_lines(suite, ledger),
        _gaps_table(found, suite.tasks),
        _steps_table(found, suite.tasks),
        _rates_table(found, suite.tasks),
        _legend(suite, costs),
        _origin(suite, list(ledger.results.values())),
    ]
    return "\n\n".join(parts)
