"""The base optimizer's state: reading its moments, and moving them along when the coordinates of A and B change.

State tensors are known by name, so that any optimizer that uses the field's names is served. What transforms
like a gradient is multiplied as a gradient is, copies of the weights as the weights are. Squared gradients
are multiplied by the squared entries (exact for permutations and sign changes), and where the tokens' factors
tell how a gradient's entries are correlated over the rank, by what that leaves out. Any other tensor that has
the parameter's shape is not understood: the parameter's state is then dropped, so that the base starts it
anew, and named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.lora.buckets import Group
from grit_optim.messages import warn
from grit_optim.rank.coordinates import Move

GRADIENT_LIKE = ("exp_avg", "momentum_buffer", "grad_avg")
SQUARE_LIKE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
WEIGHT_LIKE = ("z",)  # schedule-free's second copy of the weights

# Classes of these names decay the weights by lr·weight_decay outside the gradient, as Loshchilov and Hutter
# (2019) do; and these of bitsandbytes' kernels, whatever the class that calls them.
_DECOUPLED_NAMES = ("AdamW", "Lion", "Muon", "Adafactor")
_DECOUPLED_KERNELS = ("adam", "ademamix", "lamb", "lion")
_SQUARES_FIRST = ("adagrad", "rmsprop")  # kernels of bitsandbytes whose ``state1`` holds squared gradients
_DECOUPLED_FLAGS = ("decoupled_weight_decay", "weight_decouple", "decouple_weight_decay")


def rate(settings: dict[str, Any]) -> float | Tensor:
    """The learning rate of a parameter group in the step just taken; schedule-free's warm-up is its own, beside ``lr``."""
    return settings["scheduled_lr"] if "scheduled_lr" in settings else settings["lr"]


def decoupled_decay(
    base: Optimizer, settings: dict[str, Any], parameters: Sequence[Tensor]
) -> float | Tensor:
    """The share of the weights that ``base`` takes off in one step beside its update: rate·weight_decay, or 0.

    Args:
        base: the base optimizer, after its step.
        settings: one of its parameter groups.
        parameters: m parameters of that group.

    Returns:
        A number, or ``[m, 1, 1]`` where each parameter has its own rate (transformers' Adafactor).
    """
    decay = settings.get("weight_decay", 0.0)
    if not decay or not _decouples(base, settings):
        return 0.0
    if settings.get("scale_parameter") or settings.get("relative_step"):
        rates = [base._get_lr(settings, base.state[p]) for p in parameters]  # type: ignore[attr-defined]
        return (
            decay
            * torch.stack([torch.as_tensor(r, device=parameters[0].device) for r in rates])[:, None, None]
        )
    return rate(settings) * decay


def coupled_decay(base: Optimizer, settings: dict[str, Any]) -> float:
    """What ``base`` multiplies the weights by to add them to the gradient (an L2 penalty), 0 if it does not."""
    return 0.0 if _decouples(base, settings) else settings.get("weight_decay", 0.0)


def _decouples(base: Optimizer, settings: dict[str, Any]) -> bool:
    """Whether weight decay, if any, stays outside the gradient."""
    flags = [settings[name] for name in _DECOUPLED_FLAGS if name in settings]
    if flags:
        return bool(flags[0])
    if (kernel := _kernel(base)) is not None:
        return kernel in _DECOUPLED_KERNELS
    return any(name in type(base).__name__ for name in _DECOUPLED_NAMES)


def first_moment(base: Optimizer, parameter: Tensor) -> Tensor | None:
    """The base's average (or decayed sum) of the gradient for ``parameter``, in the parameter's shape, or None."""
    state = base.state.get(parameter, {})
    for name in ("exp_avg", "grad_avg", "momentum_buffer"):
        averages_gradients = (
            name != "momentum_buffer" or "square_avg" not in state
        )  # RMSprop's is of scaled gradients
        if isinstance(state.get(name), Tensor) and averages_gradients:
            return state[name]
    return None if _kernel(base) in _SQUARES_FIRST else _bitsandbytes_moment(state, "1")


def moment_weight(
    base: Optimizer, parameter: Tensor, settings: dict[str, Any], decay: float
) -> Tensor | float:
    """What :func:`first_moment` is to be divided by to be a mean of gradients: the sum of the weights in it.

    Args:
        base: the base optimizer.
        parameter: one of its parameters, after at least one step.
        settings: the parameter's group.
        decay: what the average keeps per step, β₁ or SGD's momentum.

    Returns:
        ``1 − β₁ᵗ`` for Adam's average after t steps, ``(1 − dampening) / (1 − β)`` for SGD's momentum buffer,
        which sums, 1 for any other.
    """
    if "dampening" in settings:
        return (1 - settings["dampening"]) / (1 - decay)
    steps = base.state.get(parameter, {}).get("step")
    return 1.0 if steps is None or "betas" not in settings else 1 - decay**steps


def freshened_correction(
    base: Optimizer, parameter: Tensor, settings: dict[str, Any], decay: float, wanted: float
) -> Tensor | float:
    """What Adam's step is too long by where its average keeps less than Adam believes, as a factor that mends it.

    In step t an average that kept ``w`` per step until then has the weight β₁ (1 − wᵗ⁻¹) + 1 − β₁, and Adam
    divides by 1 − β₁ᵗ.

    Args:
        base: the base optimizer.
        parameter: one of its parameters, after at least one step.
        settings: the parameter's group.
        decay: β₁.
        wanted: w.
    """
    steps = base.state.get(parameter, {}).get("step")
    if steps is None or "betas" not in settings:
        return 1.0
    return (1 - decay**steps) / (decay * (1 - wanted ** (steps - 1)) + 1 - decay)


def set_first_moment(base: Optimizer, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put other values into what :func:`first_moment` reads; bitsandbytes' 8-bit states are quantized anew."""
    plain: list[tuple[Tensor, Tensor]] = []
    for parameter, value in zip(parameters, values, strict=True):
        state = base.state[parameter]
        codes = state.get("state1")
        if codes is not None and codes.dtype == torch.uint8:
            _quantize(state, value)
        elif (target := first_moment(base, parameter)) is not None:
            plain.append((target, value.view_as(target)))
    if plain:
        torch._foreach_copy_([target for target, _ in plain], [value for _, value in plain])


def second_moment(base: Optimizer, parameter: Tensor) -> Tensor | None:
    """The base's average of the squared gradient for ``parameter``, elementwise, or None."""
    state = base.state.get(parameter, {})
    for name in SQUARE_LIKE:
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return value
    return _bitsandbytes_moment(state, "1" if _kernel(base) in _SQUARES_FIRST else "2")


def _kernel(base: Optimizer) -> str | None:
    """The name of the update that a bitsandbytes optimizer runs, None for any other."""
    theirs = any(kind.__module__.startswith("bitsandbytes") for kind in type(base).__mro__)
    return getattr(base, "optimizer_name", None) if theirs else None


def _bitsandbytes_moment(state: dict[str, Any], which: str) -> Tensor | None:
    """Bitsandbytes' ``state1`` or ``state2`` in fp32, dequantized where it is stored in 8 bits by blocks."""
    value = state.get(f"state{which}")
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        return value
    from bitsandbytes import functional

    scales = state[f"absmax{which}"]
    return functional.dequantize_blockwise(
        value, absmax=scales, code=state[f"qmap{which}"], blocksize=_block_size(value, scales)
    )


def _quantize(state: dict[str, Any], value: Tensor) -> None:
    """Set bitsandbytes' ``state1``, stored in 8 bits by blocks."""
    from bitsandbytes import functional

    codes, scales = state["state1"], state["absmax1"]
    contiguous = value.to(torch.float32).reshape(codes.shape).contiguous()
    stored, found = functional.quantize_blockwise(
        contiguous, code=state["qmap1"], blocksize=_block_size(codes, scales)
    )
    codes.copy_(stored)
    scales.copy_(found.absmax)


def _block_size(codes: Tensor, scales: Tensor) -> int:
    return 2 ** math.ceil(math.log2(codes.numel() / scales.numel()))


def move_weights(groups: Iterable[Group], move: Move) -> None:
    """Multiply the matrices of ``groups`` by the operators of ``move``, in its precision."""
    for group in groups:
        operator = move.a_weight if group.side == "A" else move.b_weight
        group.write(group.apply(operator, group.stack(group.parameters).to(operator.dtype)))


def set_weights(base: Optimizer, group: Group, stacked: Tensor, changed: Tensor) -> None:
    """Set the matrices of ``group`` to ``[m, rows, columns]``, and copies of the weights in the base's state likewise.

    Args:
        base: the base optimizer.
        group: the matrices.
        stacked: what they are from now on.
        changed: rank coordinates ``[S, r]`` whose copies are set too; elsewhere a copy may differ from its
            weight.
    """
    group.write(stacked)
    for name in WEIGHT_LIKE:
        states = [base.state.get(p, {}) for p in group.parameters]
        if all(isinstance(state.get(name), Tensor) for state in states):
            copies = [state[name] for state in states]
            mixed = group.masked(stacked, changed) + group.masked(group.stack(copies), ~changed)
            for copy, value in zip(copies, mixed, strict=True):
                copy.copy_(value.view_as(copy))


def move_state(
    base: Optimizer, groups: Iterable[Group], move: Move, covariances: tuple[Tensor, Tensor] | None = None
) -> None:
    """Move the base's state for the parameters of ``groups`` as ``move`` says.

    Where a state tensor is not understood, those parameters' state is dropped with a warning, and the base
    starts it anew.

    Args:
        base: the base optimizer.
        groups: the matrices.
        move: what happens to their coordinates.
        covariances: of ∇A's and of ∇B's entries over the rank, up to a factor, before the move, ``[S, r, r]``
            each; None where they are taken to be uncorrelated.
    """
    a_square, b_square = move.a_gradient.square(), move.b_gradient.square()
    if covariances is not None:
        a_square = _square_operator(move.a_gradient, covariances[0])
        b_square = _square_operator(move.b_gradient.mT, covariances[1]).mT
    unknown: set[str] = set()
    for group in groups:
        gradient, square, weight = (
            (move.a_gradient, a_square, move.a_weight)
            if group.side == "A"
            else (move.b_gradient, b_square, move.b_weight)
        )
        states = [base.state.get(p, {}) for p in group.parameters]
        strange = _unknown_names(group.parameters, states)
        if strange:
            unknown |= strange
            for parameter in group.parameters:
                base.state.pop(parameter, None)
            continue
        for names, operator in ((GRADIENT_LIKE, gradient), (SQUARE_LIKE, square), (WEIGHT_LIKE, weight)):
            for name in names:
                _move_named(group, states, name, operator)
    if unknown:
        _warn_dropped_state(base, unknown)


def _square_operator(operator: Tensor, covariance: Tensor) -> Tensor:
    """What the second moments of g become where g becomes ``O g``: ``O²`` entry by entry, times what that leaves out.

    ``E[(O g)_i²] = Σ_kl O_ik O_il E[g_k g_l]``, of which ``O²`` has the terms k = l. The others are taken
    from ``covariance``, which makes the result exact where the columns of a gradient have the same
    correlations over the rank.

    Args:
        operator: O ``[S, r, r]``.
        covariance: E[g gᵀ] up to a factor ``[S, r, r]``; zero where it is not known.
    """
    covariance, squared = covariance.to(operator.dtype), operator.square()
    uncorrelated = (squared @ covariance.diagonal(dim1=-2, dim2=-1)[..., None]).squeeze(-1)
    exact = (operator @ covariance @ operator.mT).diagonal(dim1=-2, dim2=-1).clamp_min(0)
    return squared * torch.where(uncorrelated > 0, exact / uncorrelated, 1.0)[..., None]


def _unknown_names(parameters: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> set[str]:
    """State tensors, other than known ones and step counters, that a change of coordinates would make wrong."""
    known = {*GRADIENT_LIKE, *SQUARE_LIKE, *WEIGHT_LIKE, "step"}
    return {
        name
        for parameter, state in zip(parameters, states, strict=True)
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.numel() > 1
        and (name not in known or value.shape != parameter.shape)
    }


def _move_named(group: Group, states: Sequence[dict[str, Any]], name: str, operator: Tensor) -> None:
    """Move one kind of state tensor of a whole group by one batched product."""
    present = [i for i, state in enumerate(states) if isinstance(state.get(name), Tensor)]
    if not present:
        return
    part = group if len(present) == len(states) else group.subset(present)
    tensors: list[Tensor] = [states[i][name] for i in present]
    moved = part.apply(operator, part.stack(tensors).to(operator.dtype)).to(tensors[0].dtype)
    torch._foreach_copy_(
        tensors, [value.view_as(tensor) for tensor, value in zip(tensors, moved, strict=True)]
    )


def _warn_dropped_state(base: Optimizer, names: set[str]) -> None:
    """Say which state a change of coordinates could not carry along."""
    warn(
        f"GritOptimizer changed the coordinates of A and B, and {type(base).__name__} keeps state that it does not know how to "
        f"move ({', '.join(sorted(names))}); that state was reset for the LoRA parameters. Use a base whose state is among "
        f"{', '.join(GRADIENT_LIKE + SQUARE_LIKE)}, or a mode that leaves the coordinates alone (precondition='steer' or "
        "'inverse', reprojection='none')",
    )
