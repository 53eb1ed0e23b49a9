"""The stages of a training step, by the names that counts and timings use."""

from __future__ import annotations

from typing import Any

PASSES = ("forward", "backward")
"""The model's own stages. `base` is the step of the base optimizer; every other stage is GRIT's."""


def stage_seconds(optimizer: Any) -> dict[str, float]:
    """Host seconds of each stage so far; empty for an optimizer that does not measure them."""
    return dict(optimizer.stage_seconds()) if hasattr(optimizer, "stage_seconds") else {}
