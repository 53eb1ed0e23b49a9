"""The base optimizer in the eigenbasis of its K-FAC factors."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from grit_optim.base import transport
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.options import Options
from grit_optim.preconditioners.held_gradients import Held
from grit_optim.preconditioners.mode import Mode

_NOTHING_TO_TURN = {
    "diagonal": "a diagonal Fisher's eigenbasis is the one that A and B are in: use precondition='none'",
    "ekfac": "in the eigenbasis of fisher='kfac' Adam's second moments are EK-FAC's eigenvalues: use that",
}


class Eigenbasis(Mode):
    """``"eigenbasis"``: the base works in the eigenbases of the K-FAC factors, as SOAP (Vyas et al. 2024)."""

    name = "eigenbasis"
    changes_coordinates = True
    moments_in_operators = True
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

    def refresh(self, curvature: BucketCurvature) -> None:
        """Turn to the new eigenbases and take the base's moments along."""
        self._turn_state(curvature, *curvature.refresh_eigenbases())

    def to_plain_coordinates(self, curvature: BucketCurvature) -> None:
        """Turn the base's moments back."""
        old = curvature.a_operator, curvature.b_operator
        curvature.reset_operators()
        self._turn_state(curvature, *old)

    def _turn_state(self, curvature: BucketCurvature, a_turn: Tensor, b_turn: Tensor) -> None:
        move = transport.Move(a_turn, b_turn.mT, a_turn, b_turn.mT)
        transport.move_state(self.base, curvature.bucket.groups, move)

    def before(self, held: Held) -> None:
        """Turn gradient and weights into the eigenbasis."""
        group = held.group
        held.weights = group.stack(group.parameters)
        held.gradient = self.as_the_base_sees(held, held.gradient)
        group.write(self.as_the_base_sees(held, held.weights))
        held.rotated = group.stack(group.parameters)

    def as_the_base_sees(self, held: Held, gradient: Tensor) -> Tensor:
        """Turned into the eigenbasis."""
        return held.curvature.to_eigenbasis(held.group, gradient)

    def after(self, held: Held) -> None:
        """Turn the base's step out of the eigenbasis and add it to the weights as they were."""
        assert held.weights is not None
        assert held.rotated is not None
        group = held.group
        step = held.curvature.from_eigenbasis(group, group.stack(group.parameters) - held.rotated)
        group.write(held.weights + step)
