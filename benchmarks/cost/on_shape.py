"""What optimizers' steps cost on a model of random weights that they share: a file for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..core.files import BenchmarkError
from ..core.settings import REFERENCE, Settings
from ..training.optimizers import check_optimizer
from . import results
from .compare import Plan, compare
from .lanes import Shared
from .shapes import SHAPE_LR, Workload
from .timing import prepare


def cost_on_shape(
    workload: Workload,
    optimizers: Sequence[str],
    plan: Plan,
    folder: Path,
    lr: float = SHAPE_LR,
    base: str = REFERENCE,
    threads: int | None = None,
) -> dict[str, str]:
    """Measure optimizers against plain `base` on a shared model of random weights; a file for each of them.

    Returns:
        What went wrong, by optimizer; the others have their files all the same.

    Raises:
        BenchmarkError: plain `base` itself failed, so that there is nothing to compare with.
    """
    for name in optimizers:
        check_optimizer(name)
    load = prepare(threads)
    names = list(dict.fromkeys([base, *optimizers]))
    outcome = compare(Shared(workload), names, lambda name: Settings(lr, base=base), plan)
    if base not in outcome.results:
        raise BenchmarkError(
            f"plain {base} failed, so there is nothing to compare with: {outcome.failures[base]}"
        )
    for name, found in outcome.results.items():
        result = {
            "model": workload.label(),
            "workload": asdict(workload),
            "betas": list(Settings.betas),
            "options": {},
            "learning_rate": lr,
            **found,
            **results.surroundings(name, workload.device, load),
            "failures": outcome.failures,
        }
        over = "" if base == REFERENCE or name == base else f"-over-{base}"
        if name != base or len(names) == 1:
            results.write(result, folder / f"cost-{workload.label()}-{name}{over}.json")
    return outcome.failures
