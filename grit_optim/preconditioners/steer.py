"""The base's step, turned to the natural gradient's direction."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from grit_optim.base import moments as base_moments
from grit_optim.base import settings as base_settings
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.preconditioners.held_gradients import Held, inner_product, norm
from grit_optim.preconditioners.mode import Mode


class Steer(Mode):
    """``"steer"``: the base steps, and its step is turned to the natural gradient's direction.

    For A the direction is ``−Σ^(−p) (m / c)``: m is the base's average of the gradient, which is made to
    forget as ``direction_momentum`` says and mixed with :attr:`gradient_share` of the newest gradient; c is
    the root of the base's average of the squared gradient, averaged over the rank (one value per column of A,
    per row of B); p is ``kfac_power``. A base that keeps neither gets the gradient and 1. ``step_length``
    says how long the step is. Decoupled weight decay stays outside.

    Attributes:
        gradient_share: share of the newest gradient in the direction, beside the average.
        caution: share in [0, 1] that entries of the direction lose where they go up the newest gradient.
        a_step_ratio: how much longer A's steps are than B's.
    """

    name = "steer"
    gradient_share: ClassVar[float] = 0.0
    caution: ClassVar[float] = 0.0
    a_step_ratio: ClassVar[float] = 1.0
    defaults: ClassVar[dict[str, Any]] = {**Mode.defaults, "kfac_damping": 0.3}
    uses = Mode.uses | {"kfac_power", "direction_momentum", "step_length"}

    def refresh(self, curvature: BucketCurvature) -> None:
        """Take the factors' inverses to the power p."""
        curvature.refresh_powers(self.power)

    @property
    def power(self) -> float:
        """p, the power of Σ⁻¹ that is applied."""
        assert self.options.kfac_power is not None
        return self.options.kfac_power

    def before(self, held: Held) -> None:
        """Remember the weights."""
        held.weights = held.group.stack(held.group.parameters)

    def after(self, held: Held) -> None:
        """Turn the step that the base took."""
        assert held.weights is not None
        assert held.gradient_norm is not None
        group = held.group
        taken = group.stack(group.parameters)
        decay = base_settings.decoupled_decay(self.base, self._settings(held), group.parameters)
        decayed = held.weights if isinstance(decay, float) and decay == 0 else held.weights * (1 - decay)
        step = taken - decayed
        direction = self._cautious(held, self.direction(held, self._scaled_moment(held)))
        step_size, size = norm(step), norm(direction)
        cosine = -inner_product(step, direction) / (step_size * size)
        target = self._length(held, step_size)
        length = target / size
        # Without a gradient (an expert that saw no token) the base's step fades out as its average does; so
        # must this one.
        turned = held.ready & length.isfinite() & size.isfinite() & (held.gradient_norm > 0)
        # A step that stays as it is has not been turned.
        held.cosine = torch.where(turned | cosine.isnan(), cosine, 1.0)
        held.without, held.turned = step_size, torch.where(turned, target, step_size)
        group.write(torch.where(turned, decayed - length * direction, taken))

    def direction(self, held: Held, moment: Tensor) -> Tensor:
        """What the step is turned to, from ``m / c``: ``[m, rows, columns]`` twice."""
        return held.curvature.apply(held.group, moment)

    def _cautious(self, held: Held, direction: Tensor) -> Tensor:
        """The direction, with entries made smaller that go up the newest gradient (Liang et al. 2024)."""
        if self.caution == 0:
            return direction
        against = direction * self._newest(held) < 0
        share = torch.ones_like(against, dtype=torch.float32)
        return share.masked_fill(against, 1 - self.caution) * direction

    def _length(self, held: Held, base_length: Tensor) -> Tensor:
        """Frobenius norm that each step is to have, ``[m, 1, 1]``; zero where the base did not move."""
        options, group, settings = self.options, held.group, self._settings(held)
        ratio: Tensor | float = self.a_step_ratio if group.side == "A" else 1.0
        if options.step_length == "base":
            decay, wanted = base_settings.moment_decay(settings), self._momentum(held)
            if wanted != decay:  # the base's bias correction knows nothing of what was freshened
                ratio *= base_moments.freshened_correction(
                    self.base, group.parameters, settings, decay, wanted
                )
            return ratio * base_length
        entries = held.curvature.ranks.step_rank[group.index] * group.width
        rms = _number(options.step_length) * base_settings.rate(settings)
        return ratio * rms * entries.sqrt()[:, None, None] * (base_length > 0)

    def _scaled_moment(self, held: Held) -> Tensor:
        """``m / c``, ``[m, rows, columns]``."""
        group = held.group
        moments = [
            m for m in (base_moments.first_moment(self.base, p) for p in group.parameters) if m is not None
        ]
        squares = [
            s for s in (base_moments.second_moment(self.base, p) for p in group.parameters) if s is not None
        ]
        complete = len(group.parameters)
        moment = self._mixed(held, group.stack(moments)) if len(moments) == complete else self._newest(held)
        if len(squares) < complete:
            return moment
        mean_square = group.stack(squares).mean(group.rank_dim, keepdim=True)
        return moment / mean_square.clamp_min(torch.finfo(moment.dtype).tiny).sqrt()

    def _settings(self, held: Held) -> dict[str, Any]:
        """The base's parameter group."""
        return held.settings

    def _newest(self, held: Held) -> Tensor:
        """The newest gradient of what the base descends, the penalty of a coupled weight decay included."""
        settings = self._settings(held)
        newest = -held.gradient if settings.get("maximize", False) else held.gradient
        decay = base_settings.coupled_decay(self.base, settings)
        return newest + decay * held.weights if decay and held.weights is not None else newest

    def _momentum(self, held: Held) -> float:
        """What the average that gives the direction keeps per step."""
        own, wanted = base_settings.moment_decay(self._settings(held)), self.options.direction_momentum
        return own if wanted == "base" or own == 0 else _number(wanted)

    def _mixed(self, held: Held, moment: Tensor) -> Tensor:
        """The base's average ``[m, rows, columns]`` as a mean, with the newest gradient mixed in."""
        group, settings = held.group, self._settings(held)
        decay, wanted = base_settings.moment_decay(settings), self._momentum(held)
        if wanted != decay:
            moment, decay = self._freshened(held, moment, wanted / decay), wanted
        if self.gradient_share == 0:
            return moment
        weight = base_moments.moment_weight(self.base, group.parameters, settings, decay)
        return (1 - self.gradient_share) * (moment / weight) + self.gradient_share * self._newest(held)

    def _freshened(self, held: Held, moment: Tensor, ratio: float) -> Tensor:
        """The base's average had it kept ``ratio`` times as much of its past, also written back.

        ``β m + (1 − β) g`` becomes ``ratio (β m + (1 − β) g) + (1 − ratio) g = ratio·β m + (1 − ratio·β) g``.
        """
        group, newest = held.group, self._newest(held)
        if dampening := self._settings(held).get("dampening", 0.0):
            newest = newest * (1 - dampening)
        fresh = torch.lerp(newest, moment, 1 - held.ready.to(moment.dtype) * (1 - ratio))
        base_moments.set_first_moment(self.base, group.parameters, fresh.unbind())
        return fresh


def _number(option: float | str | None) -> float:
    """An option that is a number here, since "base" has been dealt with."""
    assert isinstance(option, int | float)
    return float(option)
