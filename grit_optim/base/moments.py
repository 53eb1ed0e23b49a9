"""Reading and writing the moments that a base optimizer keeps of each gradient, under their usual names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.base import layout
from grit_optim.base.bitsandbytes import SQUARES_FIRST, dequantized, kernel, quantize
from grit_optim.processes import shards

SQUARE_LIKE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Names of state tensors that average squared gradients."""
_STATE1 = "state1"
"""The name of the first moment in bitsandbytes."""


def first_moment(base: Optimizer, parameter: Tensor) -> Tensor | None:
    """The base's average (or decayed sum) of the gradient of ``parameter``, in its shape; None if absent.

    Warns, once for each base and name, of one that is there but cannot be read.
    """
    state = base.state.get(parameter, {})
    name = _first_name(base, state)
    if name is None:
        return None
    found = dequantized(state, "1") if name == _STATE1 else state[name]
    moment = layout.decoded(found, parameter)
    if moment is None:
        layout.warn_once(
            base,
            f"first moment {name}",
            f"{type(base).__name__} keeps {name!r} as {layout.described(state[name])}, which cannot be read "
            f"as the average of the gradient of a parameter {list(parameter.shape)}. Where GRIT turns a "
            "step, it takes the newest gradient in its place. Use a base that keeps the average as a tensor "
            "in the parameter's shape, such as torch.optim.AdamW",
        )
    return moment


def _first_name(base: Optimizer, state: Mapping[str, Any]) -> str | None:
    """Under which name the average of the gradient should lie; None if the base keeps none."""
    for name in ("exp_avg", "grad_avg", "momentum_buffer"):
        # RMSprop's momentum_buffer averages scaled gradients.
        averages_gradients = name != "momentum_buffer" or "square_avg" not in state
        if state.get(name) is not None and averages_gradients:
            return name
    return _STATE1 if kernel(base) not in SQUARES_FIRST and state.get(_STATE1) is not None else None


def moment_weight(
    base: Optimizer, parameters: Sequence[Tensor], settings: dict[str, Any], decay: float
) -> Tensor | float:
    """The sum of the weights in :func:`first_moment`. The moment divided by it is a mean of gradients.

    Args:
        base: the base optimizer.
        parameters: m of its parameters in one group, after at least one step each.
        settings: their group.
        decay: the share of the average that is kept per step: β₁ or SGD's momentum.

    Returns:
        ``1 − β₁ᵗ`` for Adam's average after t steps; ``(1 − dampening) / (1 − β)`` for SGD's momentum buffer,
        which is a sum; 1 for any other, and where those weights have no positive, finite sum (a dampening of
        1 lets no gradient in but the first, and a momentum of 1 forgets none). A number for all parameters,
        or ``[m, 1, 1]`` where they have not taken equally many steps.
    """
    if "dampening" in settings:
        taken, forgotten = 1 - settings["dampening"], 1 - decay
        return taken / forgotten if taken > 0 and forgotten > 0 else 1.0
    if "betas" not in settings:
        return 1.0
    return _by_steps(base, parameters, lambda steps: 1 - decay**steps)


def _by_steps(base: Optimizer, parameters: Sequence[Tensor], formula: Callable[[Any], Any]) -> Tensor | float:
    """``formula`` of the steps that each parameter has taken by the base's count; 1 where it keeps none.

    A parameter that was unfrozen later, or that skips steps without a gradient, has taken fewer than others.
    A count on a GPU is not read back.

    Returns:
        One value where all have taken equally many steps, as far as the host knows; else ``[m, 1, 1]``.
    """
    counts = [base.state.get(p, {}).get("step") for p in parameters]
    keys = _known(counts)
    values = {
        key: 1.0 if c is None else formula(c) for key, c in dict(zip(keys, counts, strict=True)).items()
    }
    if len(values) == 1:
        return next(iter(values.values()))
    device = parameters[0].device
    found = [torch.as_tensor(values[key], dtype=torch.float32, device=device) for key in keys]
    return torch.stack(found)[:, None, None]


def _known(counts: Sequence[Any]) -> list[Any]:
    """The counts as the host knows them: a tensor on another device stands for itself."""
    here = [c for c in counts if isinstance(c, Tensor) and c.device.type == "cpu" and c.dim() == 0]
    if len(here) == len(counts):
        return torch.stack(here).tolist()  # read at once: a read for each would cost more with every pair
    return [c.item() if isinstance(c, Tensor) and c.device.type == "cpu" else c for c in counts]


def set_first_moment(base: Optimizer, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write ``values`` into what :func:`first_moment` reads; what is stored in 8 bits is quantized anew."""
    plain: list[tuple[Tensor, Tensor]] = []
    for parameter, value in zip(parameters, values, strict=True):
        state = base.state[parameter]
        name = _first_name(base, state)
        target: Any = None if name is None else state[name]
        if name == _STATE1 and isinstance(target, Tensor) and target.dtype == torch.uint8:
            quantize(state, value)
        elif layout.is_entrywise(target, parameter):
            plain.append((target, value if value.shape == parameter.shape else value.view_as(parameter)))
        elif layout.decoded(target, parameter) is not None:
            target.copy_(value.view_as(parameter))
    if plain:
        shards.copy_to([target for target, _ in plain], [value for _, value in plain])


def second_moment(base: Optimizer, parameter: Tensor) -> Tensor | None:
    """The base's average of the squared gradient of ``parameter``, entry by entry; None if it has none."""
    state = base.state.get(parameter, {})
    for name in SQUARE_LIKE:
        if (value := layout.decoded(state.get(name), parameter)) is not None:
            return value
    return layout.decoded(dequantized(state, "1" if kernel(base) in SQUARES_FIRST else "2"), parameter)
