"""Settings of the systems that came before, as keyword arguments: ``GritOptimizer(base, model, **presets.PAPER)``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

BALANCING_DAMPING = 1e-4
"""Relative damping of factors that are balanced; small, so that their spectrum stays true."""

# Defaults that belong to a way of using the curvature rather than to all of them, as measured on the naming task
# (benchmarks/FINDINGS.md). Balanced coordinates move the weights themselves, so they are changed seldom.
MODE_DEFAULTS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "steer": {"kfac_update_freq": 1, "kfac_damping": 0.3},
        "inverse": {"kfac_update_freq": 1, "kfac_damping": 0.03},
        "eigenbasis": {"kfac_update_freq": 2, "kfac_damping": 0.03},
        "balanced": {"kfac_update_freq": 10, "kfac_damping": BALANCING_DAMPING},
        "none": {"kfac_update_freq": 1, "kfac_damping": 0.03},
    }
)

_ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
             torch.optim.Adagrad)  # fmt: skip


def default_precondition(base: Optimizer) -> str:
    """How the curvature is used if nothing is asked for.

    ``"eigenbasis"`` measured best, but it needs a base that scales each entry by itself (SGD does not care for the basis)
    and whose moments can be turned with the basis (bitsandbytes keeps them in 8 bits, Adafactor as row and column means);
    for any other base ``"steer"``, which only reads what the base keeps.
    """
    return "eigenbasis" if isinstance(base, _ADAPTIVE) else "steer"


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
