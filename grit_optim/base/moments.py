"""Reading and writing the moments that a base optimizer keeps of each gradient, under their usual names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.base.bitsandbytes import SQUARES_FIRST, dequantized, kernel, quantize

SQUARE_LIKE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Names of state tensors that average squared gradients."""


def first_moment(base: Optimizer, parameter: Tensor) -> Tensor | None:
    """The base's average (or decayed sum) of the gradient of ``parameter``, in its shape; None if absent."""
    state = base.state.get(parameter, {})
    for name in ("exp_avg", "grad_avg", "momentum_buffer"):
        # RMSprop's momentum_buffer averages scaled gradients.
        averages_gradients = name != "momentum_buffer" or "square_avg" not in state
        if isinstance(state.get(name), Tensor) and averages_gradients:
            return state[name]
    return None if kernel(base) in SQUARES_FIRST else dequantized(state, "1")


def moment_weight(
    base: Optimizer, parameter: Tensor, settings: dict[str, Any], decay: float
) -> Tensor | float:
    """The sum of the weights in :func:`first_moment`. The moment divided by it is a mean of gradients.

    Args:
        base: the base optimizer.
        parameter: one of its parameters, after at least one step.
        settings: the parameter's group.
        decay: the share of the average that is kept per step: β₁ or SGD's momentum.

    Returns:
        ``1 − β₁ᵗ`` for Adam's average after t steps; ``(1 − dampening) / (1 − β)`` for SGD's momentum buffer,
        which is a sum; 1 for any other.
    """
    if "dampening" in settings:
        return (1 - settings["dampening"]) / (1 - decay)
    steps = base.state.get(parameter, {}).get("step")
    return 1.0 if steps is None or "betas" not in settings else 1 - decay**steps


def set_first_moment(base: Optimizer, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write ``values`` into what :func:`first_moment` reads; bitsandbytes' 8-bit state is quantized anew."""
    plain: list[tuple[Tensor, Tensor]] = []
    for parameter, value in zip(parameters, values, strict=True):
        state = base.state[parameter]
        codes = state.get("state1")
        if codes is not None and codes.dtype == torch.uint8:
            quantize(state, value)
        elif (target := first_moment(base, parameter)) is not None:
            plain.append((target, value.view_as(target)))
    if plain:
        torch._foreach_copy_([target for target, _ in plain], [value for _, value in plain])


def second_moment(base: Optimizer, parameter: Tensor) -> Tensor | None:
    """The base's average of the squared gradient of ``parameter``, entry by entry; None if it has none."""
    state = base.state.get(parameter, {})
    for name in SQUARE_LIKE:
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return value
    return dequantized(state, "1" if kernel(base) in SQUARES_FIRST else "2")
