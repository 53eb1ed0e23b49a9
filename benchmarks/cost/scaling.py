"""How an optimizer's share of a step changes with the tokens of a pass and with the number of sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.files import BenchmarkError, write_json
from ..core.settings import REFERENCE, Settings
from ..training.optimizers import check_optimizer, package_version
from .compare import Plan, compare
from .lanes import Shared
from .results import surroundings
from .shapes import SHAPE_LR, TARGETS, Workload, model_config
from .timing import prepare

KIND, FORMAT = "scaling", 1


@dataclass(frozen=True)
class Sweep:
    """What is varied: tokens of a pass (one sequence) at the workload's layers, and layers at its tokens."""

    tokens: Sequence[int]
    layers: Sequence[int]


def _point(shared: Shared, workload: Workload, names: Sequence[str], plan: Plan, axis: str) -> dict[str, Any]:
    """Results of all optimizers at one size."""
    shared.resize(workload)
    outcome = compare(shared, names, lambda name: Settings(SHAPE_LR), plan)
    layers = model_config(workload).num_hidden_layers
    print(f"{axis}: {workload.tokens} tokens, {layers} layers: " + ", ".join(_brief(outcome.results, names)))
    return {
        "axis": axis,
        "tokens": workload.tokens,
        "layers": layers,
        "sites": layers * len(TARGETS),
        "results": outcome.results,
        "failures": outcome.failures,
    }


def _brief(results: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    return [f"{name} {results[name]['ratio']['median']:.3f}×" for name in names[1:] if name in results]


def scale(
    workload: Workload,
    optimizers: Sequence[str],
    sweep: Sweep,
    plan: Plan,
    folder: Path,
    threads: int | None = None,
) -> Path:
    """Measure at every size; the file with all points is written after each, so a stop keeps the rest."""
    if not sweep.tokens and not sweep.layers:
        raise BenchmarkError("a scaling needs tokens or layers to vary")
    names = list(dict.fromkeys([REFERENCE, *map(check_optimizer, optimizers)]))
    load = prepare(threads)
    path = folder / f"{KIND}-{workload.label()}.json"
    points: list[dict[str, Any]] = []

    def take(shared: Shared, at: Workload, axis: str) -> None:
        """Add a point and write what there is."""
        points.append(_point(shared, at, names, plan, axis))
        result = {"kind": KIND, "format": FORMAT, "model": workload.label(), "workload": asdict(workload)}
        packages = {key: value for name in names for key, value in package_version(name).items()}
        about = {**surroundings(REFERENCE, workload.device, load), "optimizer_package": packages}
        write_json(path, {**result, "points": points, **about})

    if sweep.tokens:
        shared = Shared(replace(workload, batch_size=1, length=max(sweep.tokens)))
        for tokens in sweep.tokens:
            take(shared, replace(workload, batch_size=1, length=tokens), "tokens")
        del shared
    for layers in sweep.layers:
        smaller = replace(workload, layers=layers)
        take(Shared(smaller), smaller, "layers")
    print(f"written: {path}; table and figure: python -m benchmarks report {folder}")
    return path
