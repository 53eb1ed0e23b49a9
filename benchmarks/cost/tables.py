"""Tables in Markdown of what steps cost: counted, measured, and against the size of the work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .stages import PASSES

Result = Mapping[str, Any]

_STAGES = {
    "capture": "capture (in the backward pass)",
    "fold": "fold into the factors",
    "refresh": "refresh of the roots",
    "precondition": "turn the base's step",
    "other": "besides",
}
_COUNTED = (
    "stage",
    "kernels",
    "products, GFLOP",
    "other operations, G",
    "moved, GB",
    "products",
    "moved",
    "device, ms",
    "launches, ms",
)


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sum(costs: Iterable[Result]) -> dict[str, float]:
    """Counted costs added up."""
    costs = list(costs)
    names = ("launches", "elementwise", "read", "written", "device_seconds", "launch_seconds")
    total: dict[str, float] = {
        name: math.fsum(cost[name] for cost in costs) for name in names
    }  # in whatever order
    return {
        **total,
        "flops": sum(sum(cost["products"].values()) for cost in costs),
        "bytes": total["read"] + total["written"],
    }


def _share(part: float, whole: float) -> str:
    percent = 100 * part / whole
    return f"{percent:.{3 if percent >= 10 else 2}g} %" if part else "0"


def _large(amount: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{amount:,.0f}" if abs(amount) >= 100 else f"{amount:.3g}"


def _size(count: float) -> str:
    """Bytes as GB, or as MB where there are few."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _number(count: float) -> str:
    """A large number in G, or in M."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _counted_row(name: str, cost: Mapping[str, float], whole: Mapping[str, float]) -> list[str]:
    return [
        name,
        f"{cost['launches']:,.0f}",
        _large(cost["flops"] / 1e9),
        _large(cost["elementwise"] / 1e9),
        _large(cost["bytes"] / 1e9),
        _share(cost["flops"], whole["flops"]),
        _share(cost["bytes"], whole["bytes"]),
        _large(1e3 * cost["device_seconds"]),
        _large(1e3 * cost["launch_seconds"]),
    ]


def own_stages(result: Result) -> dict[str, Result]:
    """GRIT's own stages of a count: what is neither the model's passes nor the base's step."""
    return {name: cost for name, cost in result["stages"].items() if name not in (*PASSES, "base")}


def count_table(result: Result) -> str:
    """What a step of AdamW, and each stage of GRIT, asks of the device; shares are of AdamW's whole step."""
    work, sizes = result["workload"], result["parameters"]
    whole = _sum(result["reference"].values())
    passes = _sum(cost for name, cost in result["reference"].items() if name in PASSES)
    rows = [
        _counted_row("forward and backward", passes, whole),
        _counted_row("AdamW", _sum([result["reference"]["base"]]), whole),
    ]
    own = own_stages(result)
    rows += [
        _counted_row(f"{result['optimizer']}: {_STAGES.get(n, n)}", _sum([own[n]]), whole)
        for n in _STAGES
        if n in own
    ]
    rows.append(_counted_row(f"**{result['optimizer']}, all of it**", _sum(own.values()), whole))
    checkpointing = "activation checkpointing" if work["checkpointing"] else "no checkpointing"
    head = (
        f"{work['model']}, {_number(sizes['all'])} parameters, {sizes['sites']} sites, rank {work['rank']} "
        f"({_number(sizes['trained'])} trained); a step of {work['accumulation']} × {work['batch_size']} × "
        f"{work['length']:,} tokens, bf16 with adapters in fp32, {checkpointing}; {result['device']['name']} "
        "at its best."
    )
    return "\n\n".join([head, _rows(_COUNTED, rows), _memory_lines(result), _nf4_line(result, whole)])


def _peak_rise(result: Result) -> int:
    """By how many bytes the peak of a whole step is above the reference's."""
    theirs, mine = result["alive_bytes"]["reference"], result["alive_bytes"]["optimizer"]
    peak, plain = (max(alive["peak_of_passes"], alive["peak_of_step"]) for alive in (mine, theirs))
    return int(peak - plain)


def _memory_lines(result: Result) -> str:
    """What GRIT keeps in memory beyond AdamW, at the points of a step."""
    theirs, mine = result["alive_bytes"]["reference"], result["alive_bytes"]["optimizer"]
    more = {name: f"{(mine[name] - theirs[name]) / 1e6:.1f} MB" for name in mine}
    weights = 2 * result["parameters"]["all"] + 2 * result["parameters"]["trained"]  # bf16, adapters in fp32
    plain, rise = max(theirs["peak_of_passes"], theirs["peak_of_step"]), _peak_rise(result)
    return (
        f"Memory beyond AdamW's: between steps {more['at_rest']}; kept from forward to backward, with the "
        f"rows of earlier passes, {more['after_forward']}; before the optimizer's step "
        f"{more['before_step']}; at the peak of the passes {more['peak_of_passes']} and at that of the "
        f"optimizer's step {more['peak_of_step']}. AdamW's own peak is {_size(theirs['peak_of_passes'])} in "
        f"the passes and {_size(theirs['peak_of_step'])} in its step, beside {_size(weights)} of weights. So "
        f"the peak of the whole step rises by {rise / 1e6:.1f} MB, {100 * rise / (weights + plain):.2g} %."
    )


def _nf4_line(result: Result, whole: Mapping[str, float]) -> str:
    """What a base in NF4 changes, by formula."""
    nf4 = result["nf4"]
    moved = nf4["read"] + nf4["written"]
    return (
        f"With the base in NF4 the passes also turn {_number(nf4['weights'])} weights to bf16 {nf4['uses']} "
        f"times a step, {_size(moved)} more to move (by formula; {100 * moved / whole['bytes']:.1f} % of "
        "what is counted above): all shares become smaller by that."
    )


def sizes_table(results: Sequence[Result]) -> str:
    """GRIT's counted shares of AdamW's step, by model and size of a pass."""
    header = [
        "model",
        "layers",
        "tokens a pass",
        "passes",
        "optimizer",
        "products",
        "moved",
        "kernels",
        "device, ms",
        "launches, ms",
    ]
    rows = []
    for result in sorted(
        results, key=lambda r: (r["workload"]["model"], r["parameters"]["sites"], _tokens(r))
    ):
        work, whole, own = (
            result["workload"],
            _sum(result["reference"].values()),
            _sum(own_stages(result).values()),
        )
        rows.append([
            work["model"],
            str(result["parameters"]["sites"] // 7),
            f"{_tokens(result):,}",
            str(work["accumulation"]),
            result["optimizer"],
            *(_share(own[name], whole[name]) for name in ("flops", "bytes", "launches")),
            *(
                f"{_large(1e3 * own[name])} of {_large(1e3 * whole[name])}"
                for name in ("device_seconds", "launch_seconds")
            ),
        ])  # fmt: skip
    return _rows(header, rows)


def _tokens(result: Result) -> int:
    return int(result["workload"]["batch_size"] * result["workload"]["length"])


def _spread(times: Mapping[str, float], scale: float = 1e3, digits: int = 1) -> str:
    middle, low, high = (f"{scale * times[name]:.{digits}f}" for name in ("median", "q1", "q3"))
    return f"{middle} ({low} to {high})"


def _peak(result: Result) -> str:
    memory = result.get("memory")
    if not memory:
        return "–"
    mine, theirs = memory["optimizer"]["peak_bytes"], memory[result["reference"]]["peak_bytes"]
    return f"{_size(mine)} ({100 * (mine / theirs - 1):+.1f} %)"


def _launched(result: Result) -> str:
    """Kernels (on a CPU operations) of the optimizer's step, and of one pass beyond the reference's."""
    found = result.get("launched")
    if not found or not all(found.values()):
        return "–"
    mine, theirs = found["optimizer"], found[result["reference"]]
    kind = "kernel" if "kernel" in mine["step"] else "operations"
    return f"{mine['step'][kind]:,} + {mine['pass'][kind] - theirs['pass'][kind]:,} a pass"


_MEASURED = (
    "model", "optimizer", "step against it", "step, ms", "optimizer's step, ms", "taps, ms", "state",
    "peak memory",
    "kernels", "device",
)  # fmt: skip


def _measured_row(result: Result) -> list[str]:
    hardware = result["hardware"]
    mine = result.get("optimizer_seconds", {}).get("optimizer")
    taps = result.get("taps_seconds")
    reference = result.get("reference", "plain adamw")
    return [
        result.get("model") or "embedded",
        f"{result['optimizer']} against {reference}",
        _spread(result["ratio"], 1, 3),
        _spread(result["step_seconds"]["optimizer"]),
        "–" if mine is None else f"{1e3 * mine['median']:.2f}",
        "–" if taps is None else f"{1e3 * taps['median']:.2f}",
        f"{result['optimizer_state_bytes']['optimizer'] / 1e6:.2f} MB",
        _peak(result),
        _launched(result),
        hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads",
    ]


def cost_table(results: Sequence[Result]) -> str:
    """One row per measurement: step time as a ratio of steps taken in turns, median and quartiles."""
    parts = [_rows(_MEASURED, map(_measured_row, results))]
    failed = {
        f"- {r['model']}: {n} failed: {why}" for r in results for n, why in r.get("failures", {}).items()
    }
    loads = [r["hardware"].get("load_average_before") for r in results]
    legend = (
        "Step against it: the same steps taken in turns, as a ratio; median and quartiles. Optimizer's step: "
        "from the end of the passes to the end of optimizer.step(). Taps: passes with the optimizer's hooks "
        "less passes without. Peak memory: weights, optimizer and what a step needs besides. Kernels: of the "
        "optimizer's step, and beyond the reference's in one pass; operations on a CPU. Load of the machine "
        "before: "
        + ", ".join("unknown" if load is None else f"{load:.1f}" for load in loads)
        + " (above 0.5 it was not alone, and its times are rough)."
    )
    return "\n\n".join([*parts, *(["\n".join(sorted(failed))] if failed else []), legend])


def scaling_table(result: Result) -> str:
    """Step time against AdamW's by size: one row per point, one column per optimizer."""
    points = result["points"]
    names = list(dict.fromkeys(name for point in points for name in point["results"] if name != "adamw"))
    header = ["varied", "tokens a pass", "layers", "sites", "AdamW's step, ms", *names]
    rows = []
    for point in points:
        found = point["results"]
        plain = next((r["step_seconds"][r["reference"]] for r in found.values()), None)
        rows.append(
            [point["axis"], f"{point['tokens']:,}", str(point["layers"]), str(point["sites"])]
            + ["failed" if plain is None else _spread(plain)]
            + [_spread(found[name]["ratio"], 1, 3) if name in found else "failed" for name in names]
        )
    hardware = result["hardware"]
    return f"{result['model']} on {hardware['gpu'] or hardware['cpu']}:\n\n" + _rows(header, rows)


def count_sentence(result: Result) -> str:
    """A count in one sentence, for whoever reads no table."""
    work, own, whole = (
        result["workload"],
        _sum(own_stages(result).values()),
        _sum(result["reference"].values()),
    )
    tokens = work["accumulation"] * _tokens(result)
    return (
        f"{result['parameters']['sites']} sites and {tokens:,} tokens a step, counted without a GPU, GRIT's "
        f"stages need at least {_large(1e3 * own['device_seconds'])} ms of an {result['device']['name']} "
        f"where AdamW's whole step needs {_large(1e3 * whole['device_seconds'])}, launch "
        f"{own['launches']:,.0f} kernels beside its {whole['launches']:,.0f}, and raise the peak of memory "
        f"by {_size(_peak_rise(result))}"
    )
