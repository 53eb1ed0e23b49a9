"""What all timings share: the order of the turns, quartiles, and a machine that is ready for them."""

from __future__ import annotations

import os
import statistics

import torch

from ..core import memory


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"q1": low, "median": middle, "q3": high}


def abba(blocks: int) -> list[int]:
    """The order of `2 * blocks` blocks of two lanes: 0, 1, 1, 0, 0, 1, 1, 0, and so on."""
    return [lane for pair in range(blocks) for lane in ((0, 1) if pair % 2 == 0 else (1, 0))]


def prepare(threads: int | None) -> float:
    """Set torch's threads (None: all cores) and keep freed memory in the process.

    Returns:
        The machine's load: near 0 on a quiet machine. Times that are taken above 0.5 are rough.
    """
    memory.keep_freed_memory()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    return os.getloadavg()[0]
