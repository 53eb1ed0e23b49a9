"""Peers for any matrix: curvature of the gradients, or their polar factor; and AdamW with 8-bit moments."""

from __future__ import annotations

from typing import Any

import torch

from ..core.settings import Factory, Settings, trainable
from .construct import construct, lora_pairs, matrices, rank_side


def soap_rank(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """SOAP (pytorch_optimizer) with r×r preconditioners alone, whose basis is renewed at every step."""
    from pytorch_optimizer import SOAP

    preset = {"max_precondition_dim": rank_side(model), "precondition_frequency": 1}
    return construct(SOAP, matrices(model), given=settings.adam(), preset=preset, options=settings.options)


def soap_full(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """SOAP (pytorch_optimizer) with both sides preconditioned, d_in×d_in and d_out×d_out included."""
    from pytorch_optimizer import SOAP

    return construct(SOAP, matrices(model), given=settings.adam(), options=settings.options)


def _shampoo_preset(model: torch.nn.Module) -> dict[str, Any]:
    """Shampoo as it is run in practice; the package's defaults are for runs of 100,000 steps.

    There the preconditioner starts at step 25 and is computed every 1,000 steps, which no run here reaches,
    and the step has the gradient's own norm.
    """
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    widest = max(max(matrix.shape) for matrix in matrices(model))
    return {
        "start_preconditioning_step": 1,
        "graft_type": LayerWiseGrafting.RMSPROP,  # Shampoo's direction, the length of RMSprop's step
        "moving_average_for_momentum": True,  # so that the rate does not depend on β₁
        "decoupled_weight_decay": True,  # as with all others here
        "block_size": widest,  # one block: a side is preconditioned as a whole
        "shape_interpretation": False,
        "use_svd": True,  # exact, and faster than the Newton iteration at these sizes
    }


def shampoo_rank(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Shampoo (pytorch_optimizer) with r×r preconditioners alone, renewed at every step."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.partition import PreConditionerType

    class OneSidedShampoo(ScalableShampoo):
        """ScalableShampoo whose preconditioned side is chosen by parameter group, not once for all."""

        def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
            """Make the state of the group's parameters for the group's side."""
            self.pre_conditioner_type = group["pre_conditioner_type"]
            super().init_group(group, **kwargs)

    downs, ups = zip(*lora_pairs(model), strict=True)
    groups = [
        {
            "params": list(downs),
            "pre_conditioner_type": PreConditionerType.INPUT,
        },  # all dimensions but the last
        {"params": list(ups), "pre_conditioner_type": PreConditionerType.OUTPUT},  # the last
    ]
    preset = {**_shampoo_preset(model), "preconditioning_compute_steps": 1}
    return construct(OneSidedShampoo, groups, given=settings.adam(), preset=preset, options=settings.options)


def shampoo_full(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Shampoo (pytorch_optimizer) with both sides preconditioned, renewed every 10 steps as SOAP's."""
    from pytorch_optimizer import ScalableShampoo

    preset = {**_shampoo_preset(model), "preconditioning_compute_steps": 10}
    return construct(
        ScalableShampoo, matrices(model), given=settings.adam(), preset=preset, options=settings.options
    )


def heavyball(class_name: str) -> Factory:
    """The factory of one of heavyball's classes; sides up to `max_precond_dim` (2,048) are preconditioned.

    KLShampoo's `init_factor` (0.1), which outweighs LoRA's small gradients for many steps, is the package's
    own: with 1e-4 and 1e-6 the loss went up at once, to 6 and 14 nats.
    """

    def factory(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
        """The optimizer over all LoRA matrices."""
        import heavyball

        parameters = matrices(model)
        if parameters[0].device.type == "cpu":
            heavyball.utils.compile_mode = None  # compiling takes minutes there and gains nothing
        # Without merge_dims a small matrix stays one: merged into a vector it would not be preconditioned at
        # all.
        preset = {"merge_dims": False}
        constructor = getattr(heavyball, class_name)
        return construct(
            constructor, parameters, given=settings.adam(), preset=preset, options=settings.options
        )

    return factory


def muon(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Muon (torch): momentum's polar factor, scaled to the size of AdamW's steps, so AdamW's rates fit.

    It has one momentum (0.95, `--option momentum=`) and no betas.
    """
    return construct(
        torch.optim.Muon,
        matrices(model),
        given={"lr": settings.lr, "weight_decay": settings.weight_decay},
        preset={"adjust_lr_fn": "match_rms_adamw"},
        options=settings.options,
    )


def singd(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """SINGD (singd): inverse-free K-FAC by hooks on A's and B's own Linear modules.

    It has one momentum (0.9, `--option momentum=`) and no betas. The package's `T=10, lr_cov=0.01` move the
    preconditioner so slowly from the identity that in some hundred steps it would be SGD under another name;
    `T=1, lr_cov=0.1` reach its scale (1/damping, as far as the damping outweighs the curvature) in some
    twenty. The loss is a mean over answer tokens, which no value of `loss_average` says; "batch" is nearest,
    and the factor left (answer tokens per example) acts like a change of the damping.
    """
    from singd.optim.optimizer import SINGD

    return construct(
        SINGD,
        model,
        given={"params": matrices(model), "lr": settings.lr, "weight_decay": settings.weight_decay},
        preset={"loss_average": "batch", "T": 1, "lr_cov": 0.1},
        options=settings.options,
    )


def adamw8bit(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW (bitsandbytes) with 8-bit moments for tensors of `min_8bit_size` (4,096) elements and more."""
    from bitsandbytes.optim import AdamW8bit

    return construct(AdamW8bit, trainable(model), given=settings.adam(), options=settings.options)
