"""Moving the base optimizer's state to other coordinates of A and B, and cutting it to fewer coordinates.

State tensors are recognised by name, if type and shape are what the name stands for. Averages of gradients
are multiplied as gradients are, copies of the weights as the weights are. Averages of squared gradients are
multiplied by the squared entries of the operator, which is exact for permutations and changes of sign. Where
the K-FAC factors tell how a gradient's entries are correlated over the rank, the correlations enter too. Any
other state that could depend on coordinates cannot be moved: the parameter's state is dropped with a warning,
and the base starts it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.base import layout
from grit_optim.base.moments import SQUARE_LIKE
from grit_optim.lora.buckets import Group
from grit_optim.processes import shards

GRADIENT_LIKE = ("exp_avg", "momentum_buffer", "grad_avg")
"""Names of state tensors that average gradients."""
WEIGHT_LIKE = ("z",)
"""Names of state tensors that are a second copy of the weights, as schedule-free optimizers keep it."""
CENTRES = {"square_avg": "grad_avg"}
"""An average of squares, to the average of the gradient that a base may subtract the square of."""
_ROUNDING = 8
"""Least variance about such a centre, in units of the rounding of the centre's square."""


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
    for group in (group.in_parts for group in groups):
        operator = move.a_weight if group.side == "A" else move.b_weight
        group.write(_applied(group, operator, group.stack(group.parameters)))


def _applied(group: Group, operator: Tensor, stacked: Tensor) -> Tensor:
    """The operator on this process's rows ``[m, rows, columns]``, in the operator's precision."""
    return group.with_own_rows(group.apply(operator, group.with_all_of_the_rank(stacked.to(operator.dtype))))


def weight_copies(base: Optimizer, group: Group) -> tuple[list[int], list[Tensor]]:
    """The copies of the weights that a schedule-free base keeps as state, with their positions in ``group``.

    A parameter that has not been stepped yet has none. Other optimizers use the name for something else.
    """
    if not any("weight_sum" in settings for settings in base.param_groups):
        return [], []
    for name in WEIGHT_LIKE:
        copies = {
            i: base.state[p][name]
            for i, p in enumerate(group.parameters)
            if layout.is_entrywise(base.state.get(p, {}).get(name), p)
        }
        if copies:
            return list(copies), list(copies.values())
    return [], []


def write_copies(group: Group, copies: Sequence[Tensor], stacked: Tensor) -> None:
    """Set the copies of a group's parameters to the matrices ``[m, rows, columns]``, in place."""
    for copy, value in zip(copies, group.split(stacked), strict=True):
        shards.local(copy).copy_(shards.local(value))


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
    present, copies = weight_copies(base, group)
    if copies:
        part = group.subset(present)
        values = stacked if part is group else stacked[group.matrices(present)]
        mixed = part.masked(values, changed) + part.masked(part.stack(copies), ~changed)
        write_copies(part, copies, mixed)


def move_copies(base: Optimizer, groups: Iterable[Group], move: Move) -> None:
    """Multiply the copies of the weights that the base keeps, as :func:`move_weights` does the weights."""
    for group in (group.in_parts for group in groups):
        present, copies = weight_copies(base, group)
        if copies:
            part = group.subset(present)
            operator = move.a_weight if group.side == "A" else move.b_weight
            write_copies(part, copies, _applied(part, operator, part.stack(copies)))


def move_state(
    base: Optimizer, groups: Iterable[Group], move: Move, covariances: tuple[Tensor, Tensor] | None = None
) -> None:
    """Move the base's averages of gradients of the parameters of ``groups`` to other coordinates.

    Copies of the weights stay: see :func:`move_copies`. Where state is not recognised, it is dropped with a
    warning, and the base starts it anew.

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
    unknown: dict[str, object] = {}
    for group in groups:
        strange = _strange_state(base, group)
        if strange:
            unknown.update(strange)
            layout.start_anew(base, group.parameters)
            continue
        of_a = group.side == "A"
        gradient, square = (move.a_gradient, a_square) if of_a else (move.b_gradient, b_square)
        _move_averages(group.in_parts, [base.state.get(p, {}) for p in group.parameters], gradient, square)
    if unknown:
        layout.warn_once(
            base,
            "moved",
            f"GritOptimizer changed the coordinates of A and B. {type(base).__name__} keeps state that it "
            f"does not know how to move ({layout.listed_state(unknown)}), so the state of these LoRA "
            "parameters was reset, now and at each further change. Use a base whose state is among "
            f"{', '.join(GRADIENT_LIKE + SQUARE_LIKE)}, or options that leave the coordinates alone "
            "(precondition='spectral', 'steer' or 'inverse', reprojection='none')",
        )


def _strange_state(base: Optimizer, group: Group) -> dict[str, object]:
    """State of the group's parameters that a change of coordinates would make wrong, by name."""
    moved = {*GRADIENT_LIKE, *SQUARE_LIKE}
    copies = {id(c) for c in weight_copies(base, group)[1]}
    strange: dict[str, object] = {}
    for parameter in group.parameters:
        for owner, state in layout.states_of(base, parameter):
            for name, value in state.items():
                known = id(value) in copies or (name in moved and layout.is_entrywise(value, parameter))
                counts = name not in moved and layout.is_count(value)
                if not (counts or (known and owner is base)):
                    strange[str(name)] = value
    return strange


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


def _move_averages(
    group: Group, states: Sequence[Mapping[str, Any]], gradient: Tensor, square: Tensor
) -> None:
    """Move the averages of gradients and of squared gradients of one group, by one batched product a name.

    Args:
        group: the matrices.
        states: the base's state of each.
        gradient: the operator on gradients ``[S, r, r]``.
        square: the operator on second moments ``[S, r, r]``, without negative entries.
    """
    for name in (*SQUARE_LIKE, *GRADIENT_LIKE):  # squares first: those that are centred need the old centre
        present = [i for i, state in enumerate(states) if name in state]
        if not present:
            continue
        part = group if len(present) == len(states) else group.subset(present)
        tensors = [states[i][name] for i in present]
        values = _stacked(part, tensors, square)
        centres = [states[i][CENTRES[name]] for i in present if CENTRES.get(name) in states[i]]
        if name in GRADIENT_LIKE:
            moved = part.apply(gradient, values)
        elif len(centres) < len(present):
            moved = part.apply(square, values)
        else:
            moved = _moved_about(part, values, _stacked(part, centres, square), gradient, square)
        # Without a bound a moment near the largest number would become infinite, and stay so.
        largest = torch.finfo(tensors[0].dtype).max
        moved = moved.clamp(-largest, largest).to(tensors[0].dtype)
        shards.copy_to(tensors, part.split(part.with_own_rows(moved)))


def _stacked(group: Group, tensors: Sequence[Tensor], operator: Tensor) -> Tensor:
    """The tensors as matrices ``[m, rows, columns]`` with all of the rank.

    In the higher of their precision and the operator's.
    """
    stacked = group.with_all_of_the_rank(group.stack(tensors))
    return stacked.to(torch.promote_types(stacked.dtype, operator.dtype))


def _moved_about(group: Group, squares: Tensor, means: Tensor, gradient: Tensor, square: Tensor) -> Tensor:
    """Averages of squares that a base subtracts ``means²`` from, moved so that the difference stays positive.

    What is moved as a second moment is the variance. The averages themselves, moved by another rule than the
    means, could become smaller than the means' squares.
    """
    variance = group.apply(square, (squares - means.square()).clamp_min(0))
    moved = group.apply(gradient, means).square()
    # A variance below the rounding of the sum would be lost in it.
    floor = _ROUNDING * torch.finfo(group.parameters[0].dtype).eps * moved
    return moved + torch.maximum(variance, floor)


def narrow_state(base: Optimizer, parameter: Tensor, dim: int, rank: int) -> set[str]:
    """Cut the base's state of ``parameter`` to the first ``rank`` entries of ``dim``.

    Tensors with an entry for each of the parameter's are cut, and numbers stay. Where there is anything else,
    such as a tensor of another shape, a quantized one, a list or an object, the state is dropped.

    Returns:
        What it was dropped for, by name, with a word on what it is; none if all was cut.
    """
    # In a square matrix a statistic of the other side has the parameter's shape too.
    ambiguous = _not_entrywise(base) if len(set(parameter.shape)) == 1 else set()
    strange = {
        str(name): value
        for owner, state in layout.states_of(base, parameter)
        for name, value in state.items()
        if owner is not base
        or name in ambiguous
        or not (layout.is_count(value) or layout.is_entrywise(value, parameter))
    }
    if strange:
        layout.start_anew(base, [parameter])
        return {f"{name} ({layout.described(value)})" for name, value in strange.items()}
    state: dict[str, Any] = base.state.get(parameter, {})
    for name, value in state.items():
        if layout.is_entrywise(value, parameter):
            state[name] = value.narrow(dim, 0, rank).clone()
    return set()


def _not_entrywise(base: Optimizer) -> set[str]:
    """Names of state tensors that have another shape than their parameter, for some parameter."""
    return {
        name
        for parameter, state in base.state.items()
        for name, value in state.items()
        if isinstance(parameter, Tensor) and not (layout.is_count(value) or value.shape == parameter.shape)
    }
