"""When each part of a step is due. Steps are counted from 0, and only those in which a tap fired are counted."""

from __future__ import annotations


def every(step: int, period: int, warmup: int = 0) -> bool:
    """Whether work that repeats every ``period`` steps, not before ``warmup`` steps are done, is due in ``step``."""
    return step >= warmup and step % period == 0


def ramp(step: int, warmup: int) -> float:
    """Share of the full strength in ``step`` of what grows on a straight line over the first ``warmup`` steps."""
    return min(1.0, step / warmup) if warmup else 1.0


def capture_due(step: int, period: int) -> bool:
    """Whether the taps record in ``step``.

    B starts at zero, so δ = s·Bᵀg is zero throughout step 0 and nothing is learnt from it; the period
    therefore starts at step 1.
    """
    return step == 0 or (step - 1) % period == 0
