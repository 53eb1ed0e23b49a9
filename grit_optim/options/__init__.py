"""The options of GritOptimizer: declared once, checked, and handed to each part by subject."""

from grit_optim.options.combined import DECLARED, Options
from grit_optim.options.declared import (
    CaptureOptions,
    CurvatureOptions,
    PenaltyOptions,
    PreconditionOptions,
    RankOptions,
    ScheduleOptions,
)

__all__ = [
    "DECLARED",
    "CaptureOptions",
    "CurvatureOptions",
    "Options",
    "PenaltyOptions",
    "PreconditionOptions",
    "RankOptions",
    "ScheduleOptions",
]
