"""Peers that know LoRA: what they do to A differs from what they do to B."""

from __future__ import annotations

from typing import Any

import torch

from ..core.files import BenchmarkError
from ..core.settings import Settings
from .construct import construct, matrices

# The value that the method's paper recommends and peft's manual uses (2**4, arXiv 2402.12354); a peer is
# shown as its authors advise. On the naming task 4 did well in a first study: `--option loraplus_lr_ratio=4`
# runs that.
LORAPLUS_LR_RATIO = 16.0


def _adamw_options() -> set[str]:
    return {"eps", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"}


def loraplus(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """LoRA+ (peft) over AdamW: B's rate is `loraplus_lr_ratio` times A's, which is the settings' rate."""
    from peft.optimizers import create_loraplus_optimizer

    return construct(
        create_loraplus_optimizer,
        model,
        torch.optim.AdamW,
        # peft sets the groups' weight decay from this name and would override the plain one.
        given={"lr": settings.lr, "betas": settings.betas, "loraplus_weight_decay": settings.weight_decay},
        preset={"loraplus_lr_ratio": LORAPLUS_LR_RATIO},
        options=settings.options,
        also={"loraplus_lr_embedding", *_adamw_options()},
    )


def _scale(model: Any) -> tuple[int, int]:
    """Rank and alpha of the one active adapter."""
    active = [name for name in model.active_adapters if name in model.peft_config]
    if len(active) != 1:
        raise BenchmarkError(f"LoRA-FA needs one active adapter, found {len(active)}: {', '.join(active)}")
    config = model.peft_config[active[0]]
    return config.r, config.lora_alpha


def lorafa(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """LoRA-FA (peft): A stays as it was drawn, B takes Adam's step on its gradient times (A Aᵀ)⁻¹."""
    from peft.optimizers import create_lorafa_optimizer

    given = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    optimizer = construct(
        create_lorafa_optimizer, model, *_scale(model), given=given, options=settings.options
    )
    for group in optimizer.param_groups:
        group["betas"] = settings.betas  # peft's function has no argument for them and writes (0.9, 0.999)
    return optimizer


def riemannian(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Riemannian preconditioning (peft): AdamW on ∇A times (BᵀB + reg)⁻¹ and ∇B times (A Aᵀ + reg)⁻¹."""
    from peft.optimizers import create_riemannian_optimizer

    return construct(
        create_riemannian_optimizer,
        model,
        torch.optim.AdamW,
        given=settings.adam(),
        options=settings.options,
        also=_adamw_options(),
    )


def lorarite(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """LoRA-RITE (pytorch_optimizer) on pairs of parameters: A, its rank first, then B, its rank last."""
    from pytorch_optimizer import LoRARite

    return construct(LoRARite, matrices(model), given=settings.adam(), options=settings.options)
