"""The base optimizer in balanced coordinates of each pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from grit_optim.base import transport
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.curvature.factors import Factors
from grit_optim.options import Options
from grit_optim.preconditioners.held_gradients import Held, norm
from grit_optim.preconditioners.mode import Mode
from grit_optim.preconditioners.turned import Turned
from grit_optim.rank.coordinates import BALANCING_DAMPING, balanced_coordinates

LARGEST_CONDITION = 1e6
"""Of T, in the Frobenius norm. Beyond it a step in fp32 would not come back from there."""


class Balanced(Turned):
    """``"balanced"``: the base steps in coordinates of A and B in which both factors are diagonal.

    The operators are what multiplies the gradients where ``A ← T A`` and ``B ← B T⁻¹``: T⁻ᵀ from the left for
    A, Tᵀ from the right for B.
    """

    name = "balanced"
    # T is far from orthogonal, and second moments follow it only approximately, so it changes seldom.
    defaults: ClassVar[dict[str, Any]] = {
        **Mode.defaults,
        "kfac_update_freq": 10,
        "kfac_damping": BALANCING_DAMPING,
    }
    uses = Mode.uses - {"kfac_inversion_device"}

    @classmethod
    def check(cls, options: Options) -> None:
        """Refuse factors that balanced coordinates would not make diagonal."""
        super().check(options)
        if options.curvature.pairing == "paper":
            raise ValueError(
                "precondition='balanced' has no pairing='paper': balanced coordinates are those in which "
                "both factors are diagonal; leave pairing at 'kfac'"
            )
        if options.curvature.fisher != "kfac":
            raise ValueError(
                f"fisher={options.curvature.fisher!r} keeps moments of gradients in the coordinates of A and "
                "B, which precondition='balanced' changes; use fisher='kfac', or another precondition"
            )

    def derive(self, curvature: BucketCurvature) -> None:
        """Balance the factors as they are in the present coordinates, and go on from these."""
        present = _factors_in(curvature, curvature.a_operator, curvature.b_operator)
        found = balanced_coordinates(
            present, curvature.ranks.in_use, curvature.factors_ready(), curvature.damping
        )
        transform = found.transform @ curvature.b_operator.double().mT
        inverse = torch.linalg.inv_ex(transform).inverse
        condition = norm(transform) * norm(inverse)
        usable = found.usable & (condition < LARGEST_CONDITION)[:, 0, 0]
        curvature.put_operators(inverse.mT, transform.mT, usable)

    def move(
        self, curvature: BucketCurvature, old: tuple[Tensor, Tensor]
    ) -> tuple[transport.Move, tuple[Tensor, Tensor] | None]:
        """``T_new T_old⁻¹``, with the factors in the old coordinates as the gradients' covariances."""
        transform = curvature.b_operator.double().mT @ old[0].double().mT
        inverse = old[1].double().mT @ curvature.a_operator.double().mT
        present = _factors_in(curvature, *old)
        covariances = present.gradient, present.activation
        return transport.Move(transform, inverse, inverse.mT, transform.mT), covariances

    def as_the_base_sees(self, held: Held, gradient: Tensor) -> Tensor:
        """``T⁻ᵀ ∇A`` and ``∇B Tᵀ``."""
        return held.curvature.apply(held.group, gradient)

    def turn(self, held: Held, stacked: Tensor) -> Tensor:
        """``T A`` and ``B T⁻¹``."""
        return held.group.apply(held.curvature.operator("B" if held.group.side == "A" else "A").mT, stacked)

    def turn_back(self, held: Held, stacked: Tensor) -> Tensor:
        """``T⁻¹ A`` and ``B T``."""
        return held.group.apply(held.curvature.operator(held.group.side).mT, stacked)


def _factors_in(curvature: BucketCurvature, a_operator: Tensor, b_operator: Tensor) -> Factors:
    """The factors in the coordinates of these operators, T⁻ᵀ and Tᵀ ``[S, r, r]``."""
    moved = replace(curvature.factors)
    moved.change_coordinates(b_operator.double().mT, a_operator.double().mT)
    return moved
