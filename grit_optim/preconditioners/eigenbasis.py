"""The base optimizer in the eigenbasis of its K-FAC factors."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from grit_optim.base import transport
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.options import Options
from grit_optim.preconditioners.held_gradients import Held
from grit_optim.preconditioners.mode import Mode
from grit_optim.preconditioners.turned import Turned

_NOTHING_TO_TURN = {
    "diagonal": "a diagonal Fisher's eigenbasis is the one that A and B are in: use precondition='none'",
    "ekfac": "in the eigenbasis of fisher='kfac' Adam's second moments are EK-FAC's eigenvalues: use that",
}


class Eigenbasis(Turned):
    """``"eigenbasis"``: the base works in the eigenbases of the K-FAC factors, as SOAP (Vyas et al. 2024)."""

    name = "eigenbasis"
    operators_rotate = True
    defaults: ClassVar[dict[str, Any]] = {**Mode.defaults, "kfac_update_freq": 2}
    uses = Mode.uses - {"kfac_damping"}

    @classmethod
    def check(cls, options: Options) -> None:
        """Refuse Fisher approximations that have no eigenbasis of their own."""
        super().check(options)
        fisher = options.curvature.fisher
        if fisher in _NOTHING_TO_TURN:
            raise ValueError(
                f"fisher={fisher!r} adds nothing to precondition='eigenbasis': {_NOTHING_TO_TURN[fisher]}"
            )

    def derive(self, curvature: BucketCurvature) -> None:
        """Take the new eigenbases."""
        curvature.refresh_eigenbases()

    def move(
        self, curvature: BucketCurvature, old: tuple[Tensor, Tensor]
    ) -> tuple[transport.Move, tuple[Tensor, Tensor] | None]:
        """``Q_newᵀ Q_old``; the covariances are left out, since they are nearly diagonal there."""
        a_turn, b_turn = curvature.a_operator.mT @ old[0], curvature.b_operator.mT @ old[1]
        return transport.Move(a_turn, b_turn.mT, a_turn, b_turn.mT), None

    def as_the_base_sees(self, held: Held, gradient: Tensor) -> Tensor:
        """Turned into the eigenbasis, as the weights are."""
        return self.turn(held, gradient)

    def turn(self, held: Held, stacked: Tensor) -> Tensor:
        """Turned into the eigenbasis."""
        return held.curvature.to_eigenbasis(held.group, stacked)

    def turn_back(self, held: Held, stacked: Tensor) -> Tensor:
        """Turned out of the eigenbasis."""
        return held.curvature.from_eigenbasis(held.group, stacked)
