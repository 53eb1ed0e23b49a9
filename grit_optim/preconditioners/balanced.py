"""Pairs kept in balanced coordinates."""

from __future__ import annotations

from typing import Any, ClassVar

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.options import Options
from grit_optim.preconditioners.mode import Mode
from grit_optim.rank import moves
from grit_optim.rank.coordinates import BALANCING_DAMPING


class Balanced(Mode):
    """``"balanced"``: the base steps in coordinates of A and B in which both factors are diagonal."""

    name = "balanced"
    changes_coordinates = True
    # The weights themselves move, so that is done seldom.
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

    def refresh(self, curvature: BucketCurvature) -> None:
        """Move weights, moments and factors to balanced coordinates."""
        moves.balance(self.base, curvature, curvature.damping)
