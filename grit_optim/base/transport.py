"""Moving the base optimizer's state to other coordinates of A and B, and cutting it to fewer coordinates.

State tensors are recognised by name. Averages of gradients are multiplied as gradients are, copies of the
weights as the weights are. Averages of squared gradients are multiplied by the squared entries of the
operator, which is exact for permutations and changes of sign. Where the K-FAC factors tell how a gradient's
entries are correlated over the rank, the correlations enter too. Any other tensor of state cannot be moved:
the parameter's state is dropped with a warning, and the base starts it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.base.moments import SQUARE_LIKE
from grit_optim.lora.buckets import Group
from grit_optim.messages import warn

GRADIENT_LIKE = ("exp_avg", "momentum_buffer", "grad_avg")
"""Names of state tensors that average gradients."""
WEIGHT_LIKE = ("z",)
"""Names of state tensors that are a second copy of the weights, as schedule-free optimizers keep it."""


@dataclass(frozen=True)
class Move:
    """A change of the coordinates of A and B, as operators ``[S, r, r]``.

    Attributes:
        a_weight: ``A ← a_weight A``.
        b_weight: ``B ← B b_weight``.
        a_gradient: ``∇A ← a_gradient ∇A``.
        b_gradient: ``∇B ← ∇B b_gradient``.
    """

    a_weight: Tensor
    b_weight: Tensor
    a_gradient: Tensor
    b_gradient: Tensor


def move_weights(groups: Iterable[Group], move: Move) -> None:
    """Multiply the matrices of ``groups`` by the operators of ``move``, in the operators' precision."""
    for group in groups:
        operator = move.a_weight if group.side == "A" else move.b_weight
        group.write(group.apply(operator, group.stack(group.parameters).to(operator.dtype)))


def set_weights(base: Optimizer, group: Group, stacked: Tensor, changed: Tensor) -> None:
    """Set the matrices of ``group``, and the copies of them that the base's state may hold.

    Args:
        base: the base optimizer.
        group: the matrices.
        stacked: their new values ``[m, rows, columns]``.
        changed: rank coordinates ``[S, r]`` whose copies are set too. Elsewhere a copy may differ from its
            weight, and stays.
    """
    group.write(stacked)
    for name in WEIGHT_LIKE:
        found = [base.state.get(p, {}).get(name) for p in group.parameters]
        # A parameter that has not been stepped yet has no copy.
        present = [i for i, copy in enumerate(found) if isinstance(copy, Tensor)]
        if present:
            part, copies = group.subset(present), [found[i] for i in present]
            values = stacked if part is group else stacked[present]
            mixed = part.masked(values, changed) + part.masked(part.stack(copies), ~changed)
            for copy, value in zip(copies, mixed, strict=True):
                copy.copy_(value.view_as(copy))


def move_state(
    base: Optimizer, groups: Iterable[Group], move: Move, covariances: tuple[Tensor, Tensor] | None = None
) -> None:
    """Move the base's state of the parameters of ``groups`` to other coordinates.

    Where a state tensor is not recognised, those parameters' state is dropped with a warning, and the base
    starts it anew.

    Args:
        base: the base optimizer.
        groups: the matrices.
        move: the change of coordinates.
        covariances: of ∇A's and of ∇B's entries over the rank before the move, up to a factor, ``[S, r, r]``
            each; None: take the entries to be uncorrelated.
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
    """The operator on second moments of g where g becomes ``O g``: ``O²`` entry by entry, times a correction.

    ``E[(O g)_i²] = Σ_kl O_ik O_il E[g_k g_l]``. ``O²`` accounts for the terms k = l. ``covariance`` gives
    those with k ≠ l, as one factor for each i. The result is exact where all columns of a gradient have equal
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
    """Names of state tensors that a change of coordinates would make wrong, step counters left out."""
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
    """Move the state tensors of one name for a whole group, by one batched product."""
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
    """Warn of state that could not follow a change of coordinates."""
    warn(
        f"GritOptimizer changed the coordinates of A and B. {type(base).__name__} keeps state that it does "
        f"not know how to move ({', '.join(sorted(names))}), so the state of these LoRA parameters was "
        f"reset. Use a base whose state is among {', '.join(GRADIENT_LIKE + SQUARE_LIKE)}, or options that "
        "leave the coordinates alone (precondition='steer' or 'inverse', reprojection='none')",
    )


def narrow_state(base: Optimizer, parameter: Tensor, dim: int, rank: int) -> set[str]:
    """Cut the base's state of ``parameter`` to the first ``rank`` entries of ``dim``.

    Where a state tensor does not have the parameter's shape, or is quantized, the parameter's state is
    dropped.

    Returns:
        The names of the tensors for which it was dropped; none if all were cut.
    """
    state: dict[str, Any] = base.state.get(parameter, {})
    tensors = {
        name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1
    }
    strange = {
        n
        for n, value in tensors.items()
        if value.shape != parameter.shape or not value.dtype.is_floating_point
    }
    if strange:
        base.state.pop(parameter, None)
        return strange
    for name, value in tensors.items():
        state[name] = value.narrow(dim, 0, rank).clone()
    return set()
