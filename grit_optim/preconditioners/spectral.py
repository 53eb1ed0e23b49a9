"""The base's step, turned to the direction of steepest descent in the spectral norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim import linalg
from grit_optim.base.settings import finds_its_rate, is_adam
from grit_optim.preconditioners.held_gradients import Held, inner_product, norm
from grit_optim.preconditioners.mode import Mode
from grit_optim.preconditioners.steer import Average, Steer
from grit_optim.processes.pieces import Norm, Sum, Work

STEP_RMS = 0.6
"""Root mean square of a step's entries around an Adam, in units of the learning rate."""
DIRECTION_MOMENTUM = 0.6
"""What the average of the gradient keeps per step around an Adam."""
_ORTHOGONAL_DAMPING = 0.01
"""Share of the mean squared singular value below which a direction of the momentum is taken for noise."""

_NOTHING = 1e-8
"""Square of an average over that of a gradient, below which the average is made of rounding errors."""


class Spectral(Steer):
    """``"spectral"``: as "steer", to the steepest descent in the spectral norm of Fisher coordinates.

    With ``P = Σ^(−p/2)`` and ``X = P (m / c)``: for A the direction is ``−P (X Xᵀ)^(−1/2) X``. Muon (Jordan
    et al. 2024) orthogonalises the momentum of a whole weight matrix; here the r×r side is enough, the
    curvature of the tokens sets the coordinates, and nothing is kept between steps but the factors.

    The length of a step around an Adam is a share of the learning rate. Adam's own step shrinks with the
    noise in its average, so with β₁: at β₁ = 0.9 its entries are a quarter to a half of the learning rate. A
    length of its own lets one learning rate serve whatever β₁ is, and lets the direction be as fresh as it
    wants to be, which is fresher than β₁ = 0.9. Any other base's learning rate means something else, and so
    does that of an Adam that finds its own rate: there the base's own step says how long, and its average
    which way.

    A whitened step spreads its length over all r directions. Where the gradient lies in a few of them, as it
    does at first and as long as a low learning rate leaves it so, the base's step Δ of equal length decreases
    the loss faster. So the step takes a share of Δ as well, as much as its decrease ``⟨m, ·⟩`` lacks of Δ's.
    The sum may be longer than both, and far below the best rate it has to be. Near and above it, where steps
    already go past the lowest point along them, it is no longer than the longer of the two.
    """

    name = "spectral"
    gradient_share = 0.4  # at a momentum of 0.6, Nesterov's
    caution = 0.7
    a_step_ratio = 1.5
    defaults: ClassVar[dict[str, Any]] = {**Mode.defaults, "kfac_damping": 0.3, "kfac_power": 0.5}

    @classmethod
    def defaults_around(cls, base: Optimizer) -> dict[str, Any]:
        """Around an Adam that is given its rate, a length and a momentum of its own."""
        own = is_adam(base) and not finds_its_rate(base)
        return {
            **cls.defaults,
            **({"step_length": STEP_RMS, "direction_momentum": DIRECTION_MOMENTUM} if own else {}),
        }

    @property
    def power(self) -> float:
        """p/2, since P is applied on both sides of the whitening."""
        return super().power / 2

    def completed(self, held: Held, move: Tensor, average: Average, descent: Tensor) -> Work[Tensor]:
        """The turned step, and the share of the base's own that it lacks to decrease the loss as much.

        Where the sum is longer than both, :meth:`_slope_left` says how much of that it keeps.
        """
        asked = [Sum(inner_product(average.fresh, one)) for one in (descent, move)]
        sizes = [Norm(norm(one)) for one in (move, descent)]
        wanted, along, *found = yield [*asked, *sizes, *self._slopes(held, average)]
        lacking = (1 - along / wanted).clamp(0, 1)
        longest = torch.maximum(found[0], found[1])
        slope_left = self._slope_left(held, average, *found[2:])
        whole = move.add_(descent.mul_(torch.where(wanted > 0, lacking, 0.0)))
        (length,) = yield [Norm(norm(whole))]
        limit = longest + slope_left * (length - longest)
        return whole.mul_(torch.where(length > longest, limit / length, 1.0))

    def _slopes(self, held: Held, average: Average) -> list[Sum]:
        """Asks for the square of the earlier gradients' sum, its product with the newest, and that's square.

        ``[m, 1, 1]`` each.
        """
        newest = self._newest(held)
        earlier = average.fresh - self._newest_share(held) * newest  # of a weight that is known
        products = ((earlier, earlier), (newest, earlier), (newest, newest))
        return [Sum(inner_product(left, right)) for left, right in products]

    def _slope_left(
        self, held: Held, average: Average, square: Tensor, product: Tensor, newest: Tensor
    ) -> Tensor:
        """1 while the newest gradient goes half as far along the earlier ones as they did, or farther.

        With less it falls to 0, where the newest goes against the earlier. On a quadratic a further step as
        long as those before comes to the lowest point along them where the slope has halved: what is longer
        goes past it. ``[m, 1, 1]``; 0 where there is no earlier gradient, or only rounding errors of one.

        Args:
            held: the matrices.
            average: the base's average of the gradient.
            square: as :meth:`_slopes` asks for it.
            product: likewise.
            newest: likewise, the square of the newest gradient.
        """
        slope = (average.weight - self._newest_share(held)) * product / square
        return torch.where(square > _NOTHING * newest, (2 * slope).clamp(0, 1), 0.0)

    def direction(self, held: Held, moment: Tensor) -> Work[Tensor]:
        """``P (X Xᵀ)^(−1/2) X`` for A, ``X (Xᵀ X)^(−1/2) P`` for B."""
        group, curvature = held.group, held.curvature
        inner = curvature.apply(group, moment)
        (gram,) = yield [Sum(inner @ inner.mT if group.side == "A" else inner.mT @ inner)]
        mask = curvature.ranks.mask[group.index]
        strength = linalg.damping_strength(gram, _ORTHOGONAL_DAMPING, relative=True, rank=mask.sum(-1))
        whitening = linalg.damped_root(gram, strength, 2, _ORTHOGONAL_DAMPING)[0]
        whitening = linalg.block(whitening, mask)  # what was given up stays exactly zero
        turned = whitening @ inner if group.side == "A" else inner @ whitening
        return curvature.apply(group, turned)
