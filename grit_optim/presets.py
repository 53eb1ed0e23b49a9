"""Settings of the systems that came before, as keyword arguments: ``GritOptimizer(base, model, **presets.PAPER)``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

from grit_optim.options import is_adam

BALANCING_DAMPING = 1e-4
"""Relative damping of factors that are balanced; small, so that their spectrum stays true."""

# Defaults that belong to a way of using the curvature rather than to all of them, as measured
# (benchmarks/FINDINGS.md). Balanced coordinates move the weights themselves, so they are changed seldom.
_COMMON = {
    "kfac_update_freq": 1,
    "kfac_damping": 0.03,
    "kfac_power": 1.0,
    "gradient_share": 0.0,
    "caution": 0.0,
    "a_step_ratio": 1.0,
}
MODE_DEFAULTS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "spectral": {
            **_COMMON,
            "kfac_damping": 0.3,
            "kfac_power": 0.5,
            "gradient_share": 0.4,
            "caution": 0.7,
            "a_step_ratio": 1.5,
        },
        "steer": {**_COMMON, "kfac_damping": 0.3},
        "inverse": _COMMON,
        "eigenbasis": {**_COMMON, "kfac_update_freq": 2},
        "balanced": {**_COMMON, "kfac_update_freq": 10, "kfac_damping": BALANCING_DAMPING},
        "none": _COMMON,
    }
)

STEP_RMS = 0.6
"""Length of a "spectral" step around an Adam: root mean square of its entries, in units of the learning rate."""


DIRECTION_MOMENTUM = 0.6
"""What the average of the gradient keeps per step in "spectral" around an Adam."""


def adam_defaults(precondition: str, base: Optimizer) -> dict[str, Any]:
    """How long a step is, and how fresh its direction, if nothing is asked for.

    Adam's own step shrinks with the noise in its average, so with β₁: at β₁ = 0.9 it is a quarter to a half
    of the learning rate per entry. A fixed length instead lets one learning rate serve whatever β₁ is, and
    the direction can be as fresh as it wants to be, which is fresher than β₁ = 0.9. Any other base's learning
    rate means something else, and so does that of an Adam that finds its own rate (D-Adaptation keeps it as
    ``d``): there the base's own step says how long, and its average which way.
    """
    finds_rate = any("d" in group for group in base.param_groups)
    ours = precondition == "spectral" and is_adam(base) and not finds_rate
    return {
        "step_length": STEP_RMS if ours else "base",
        "direction_momentum": DIRECTION_MOMENTUM if ours else "base",
    }


def with_mode_defaults(options: dict[str, Any], base: Optimizer) -> dict[str, Any]:
    """The options, with what is None and belongs to a way of using the curvature set to that way's default."""
    precondition = options["precondition"]
    defaults = {
        **MODE_DEFAULTS.get(precondition, MODE_DEFAULTS["none"]),
        **adam_defaults(precondition, base),
    }
    return {
        name: defaults[name] if value is None and name in defaults else value
        for name, value in options.items()
    }


PAPER: MappingProxyType[str, Any] = MappingProxyType(
    {
        "precondition": "inverse",
        "pairing": "paper",
        "damping": "absolute",
        "preserve_norm": False,
        "fisher_decay": None,
        "kfac_update_freq": 50,
        "kfac_min_samples": 64,
        "kfac_damping": 1e-3,
        "kfac_inversion_device": "cpu",
        "cov_update_freq": 15,
        "max_tokens": None,
        "ng_warmup_steps": 0,
        "reprojection": "two_sided",
        "reprojection_freq": 50,
        "reprojection_k": 8,
        "reprojection_warmup_steps": 0,
        "enable_rank_adaptation": True,
        "rank_adaptation_threshold": 0.99,
        "min_lora_rank": 4,
        "rank_adaptation_start_step": 0,
        "lambda_kfac": 1e-5,
        "lambda_reproj": 1e-4,
        "regularizer_warmup_steps": 0,
    }
)
"""Every default of the GRIT library (arXiv 2601.00231, §A.4): its natural gradient, pairing, damping and projections."""

PAPER_LONG_RUN: MappingProxyType[str, Any] = MappingProxyType(
    {
        **PAPER,
        "kfac_min_samples": 192,
        "kfac_update_freq": 150,
        "kfac_damping": 0.003,
        "reprojection_freq": 300,
        "reprojection_warmup_steps": 500,
        "rank_adaptation_start_step": 500,
    }
)
"""The GRIT library's advice for runs of one to three epochs."""
