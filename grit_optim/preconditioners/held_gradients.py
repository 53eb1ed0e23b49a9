"""The pairs' gradients, held while the base optimizer may be given others in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grit_optim.base.rounds import put_back
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.lora.buckets import Group, most_at_once
from grit_optim.processes import shards
from grit_optim.processes.pieces import Norm, Sharing, Sum, answers


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the latest step did to m matrices of one side, all ``[m]`` on their device.

    Attributes:
        bucket: position of their bucket.
        side: "A" or "B".
        positions: each one's position in the bucket.
        gradient_norm: ‖∇‖ of the loss.
        without: norm of the update without curvature: the gradient in "inverse", the base's own step in
            "spectral" and "steer"; None in the modes that only know the one with.
        turned: norm of the update with it: Σ⁻¹∇ or the turned step; None where ``without`` is.
        cosine: of the angle between the two; NaN where one is zero, None where ``without`` is.
    """

    bucket: int
    side: str
    positions: tuple[int, ...]
    gradient_norm: Tensor
    without: Tensor | None = None
    turned: Tensor | None = None
    cosine: Tensor | None = None


@dataclass(eq=False)
class Held:
    """One group's gradients while the base optimizer is given others in their place.

    Where the group has a ``sharing``, the stacks are of this process's rows, ``[m, its rows, columns]``.

    Attributes:
        curvature: of the bucket that the group belongs to.
        group: the parameters that have a gradient in this step, m of them, all in one parameter group.
        settings: the base's parameter group that holds them in this step.
        originals: their own gradients, given back after the step.
        loss_gradient: these stacked, ``[m, rows, columns]``; None once they are replaced.
        gradient: what the base will see, ``[m, rows, columns]``; the same tensor while nothing has changed
            it.
        weights: the matrices before the step ``[m, rows, columns]``, for the modes that need them.
        rotated: the matrices as the base saw them, for the modes that turn them.
        copies: the copies of the matrices in the base's state before the step, for the modes that turn them.
        rotated_copies: these as the base saw them.
        gradient_norm: Frobenius norm of each gradient of the loss, ``[m, 1, 1]``; until the base has stepped
            that of this process's rows.
        without: norm of each update without curvature, ``[m, 1, 1]``: of the gradient in "inverse", of the
            base's step in "spectral" and "steer"; None in the modes that only know the one with.
        turned: norm of each update with curvature.
        cosine: of the angle between the update with and without curvature, ``[m, 1, 1]``; NaN where one is
            zero, None in the modes that only know the one with.
    """

    curvature: BucketCurvature
    group: Group
    settings: dict[str, Any]
    originals: list[Tensor]
    loss_gradient: Tensor | None
    gradient: Tensor
    weights: Tensor | None = None
    rotated: Tensor | None = None
    copies: Tensor | None = None
    rotated_copies: Tensor | None = None
    gradient_norm: Tensor | None = None
    without: Tensor | None = None
    turned: Tensor | None = None
    cosine: Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether the base is to see others than the parameters' own gradients."""
        return self.gradient is not self.loss_gradient

    @property
    def sharing(self) -> Sharing | None:
        """How processes share the matrices out, if the stacks are of this process's rows alone."""
        return self.group.sharing

    @property
    def norm_of_own(self) -> Norm:
        """Asks for the gradients' norms, given those of this process's rows."""
        assert self.gradient_norm is not None
        return Norm(self.gradient_norm)

    @property
    def ready(self) -> Tensor:
        """Which of the m matrices have an operator in force, as ``[m, 1, 1]``."""
        return self.curvature.ready(self.group.side)[self.group.index][:, None, None]

    def outcome(self, bucket: int) -> Outcome:
        """What is kept of the group's step until the next one.

        Args:
            bucket: position of the group's bucket.
        """
        assert self.gradient_norm is not None
        others = [t if t is None else t.flatten() for t in (self.without, self.turned, self.cosine)]
        return Outcome(bucket, self.group.side, self.group.positions, self.gradient_norm.flatten(), *others)


@dataclass(frozen=True, eq=False)
class Unit:
    """Matrices that are worked on together: one group's, or some of it.

    Attributes:
        curvature: of the bucket that the group belongs to.
        settings: the base's parameter group that holds them in this step.
        group: the parameters, all with a gradient.
    """

    curvature: BucketCurvature
    settings: dict[str, Any]
    group: Group

    def in_parts(self) -> Unit:
        """The matrices with stacks of this process's rows alone, unless what is applied is whole."""
        moments = self.curvature.moments
        whole = moments is not None and moments.elementwise
        return self if whole else replace(self, group=self.group.in_parts)

    def hold(self, finite: Tensor | None) -> Held:
        """Stack the gradients; zeros if not ``finite``, as :func:`all_finite` tells.

        A zero gradient is the one answer that costs no read-back and poisons neither weights nor moments.
        """
        originals = self.group.gradients()
        gradient = self.group.stack(originals)
        held = Held(self.curvature, self.group, self.settings, originals, gradient, gradient)
        if finite is not None:
            held.gradient = torch.where(finite.to(gradient.device), gradient, torch.zeros_like(gradient))
            held.loss_gradient = None
        return held


def units_with_gradient(
    curvatures: Iterable[BucketCurvature], settings: Mapping[int, dict[str, Any]]
) -> list[Unit]:
    """The matrices of all groups that have a gradient, as far as the base steps them.

    Args:
        curvatures: of the buckets.
        settings: ``id(parameter)`` to the base's parameter group that holds it now.
    """
    units = []
    for curvature in curvatures:
        together = [found for group in curvature.bucket.groups for found in group.by_settings(settings)]
        # In the model's order, whatever the order of the parameter groups is.
        for its, group in sorted(together, key=lambda found: (found[1].side, found[1].positions[0])):
            part = group.with_gradient()
            if part is not None:
                units.append(Unit(curvature, its, part))
    return units


def in_rounds(units: Sequence[Unit]) -> list[list[Unit]]:
    """The units in pieces, and these in lists of what is worked on together."""
    rounds: list[list[Unit]] = []
    most, room = most_at_once(unit.group for unit in units), 0
    for piece in (replace(unit, group=part) for unit in units for part in unit.group.pieces(most)):
        if piece.group.bytes > room:
            rounds.append([])
            room = most
        rounds[-1].append(piece)
        room -= piece.group.bytes
    return rounds


def all_finite(units: Iterable[Unit]) -> Tensor | None:
    """Whether no entry of any gradient is infinite or NaN: a boolean scalar; None where that is known.

    Where processes share gradients out, each looks at its own part, and they tell each other.
    """
    largest: list[Tensor] = []
    shared = None
    for unit in units:
        gradients = unit.group.gradients()
        shared = shards.layout_of(gradients[0]) or shared
        parts = [shards.local(g) for g in gradients]
        # The largest entry shows it in one pass: it is NaN if any entry is.
        largest += torch._foreach_norm(parts, torch.inf) if parts[0].numel() else [parts[0].sum()]
    if not largest:
        return None
    finite = torch.stack([one.to(largest[0].device) for one in largest]).isfinite().all()
    if shared is not None:
        finite = shards.true_everywhere(finite, shared)
    # The usual case; looking costs nothing on the host.
    return None if finite.device.type == "cpu" and finite else finite


def clip(held: Sequence[Held], max_norm: float) -> None:
    """Scale the held gradients so that their joint norm is at most ``max_norm``."""
    if not held:
        return
    device = held[0].gradient.device
    squares = answers([(h.sharing, Sum(h.gradient.square().sum())) for h in held])
    total = torch.stack([square.to(device) for square in squares]).sum().sqrt()
    factor = (max_norm / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp_max(1.0)
    for h in held:
        h.gradient = h.gradient * factor.to(h.gradient.device)


def hand_over(held: Iterable[Held]) -> None:
    """Let the base see the held gradients, where they are others than the parameters' own."""
    for h in held:
        if not h.changed:
            continue
        for parameter, gradient in zip(h.group.parameters, h.group.unstack(h.gradient), strict=True):
            parameter.grad = gradient


def give_back(held: Iterable[Held]) -> None:
    """Restore the parameters' own gradients."""
    changed = [h for h in held if h.changed]
    put_back([pair for h in changed for pair in zip(h.group.parameters, h.originals, strict=True)])


def norm(stacked: Tensor) -> Tensor:
    """Frobenius norm of each matrix: ``[m, rows, columns] -> [m, 1, 1]``."""
    return torch.linalg.matrix_norm(stacked, keepdim=True)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of the matrices of two stacks: ``[m, rows, columns]`` twice to ``[m, 1, 1]``.

    In the higher of their precisions: a base's average may be in another than the gradient.
    """
    dtype = torch.promote_types(left.dtype, right.dtype)
    return torch.linalg.vecdot(left.flatten(1).to(dtype), right.flatten(1).to(dtype))[:, None, None]
