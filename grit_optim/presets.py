"""Settings of the GRIT library as keyword arguments: ``GritOptimizer(base, model, **presets.PAPER)``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

PAPER: MappingProxyType[str, Any] = MappingProxyType(
    {
        "precondition": "inverse",
        "pairing": "paper",
        "damping": "absolute",
        "step_length": "natural",
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
        "rank_adaptation_threshold": 0.99,
        "min_lora_rank": 4,
        "rank_adaptation_start_step": 0,
        "lambda_kfac": 1e-5,
        "lambda_reproj": 1e-4,
        "regularizer_warmup_steps": 0,
    }
)
"""Every default of the GRIT library (arXiv 2601.00231, §A.4)."""

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
