"""The base's step, turned to the natural gradient's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grit_optim.base import moments as base_moments
from grit_optim.base import settings as base_settings
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.preconditioners.held_gradients import Held, inner_product, norm
from grit_optim.preconditioners.mode import Mode
from grit_optim.processes.pieces import Ask, Columns, Norm, RankMean, Rows, Sum, Work


@dataclass(frozen=True)
class Average:
    """A base's average of the gradient, m matrices stacked.

    Attributes:
        fresh: as ``direction_momentum`` has it, ``[m, rows, columns]``.
        weight: the sum of the gradients' weights in ``fresh``.
        correction: that sum in the average as the base made it, as its bias correction takes it to be, over
            ``weight``.
    """

    fresh: Tensor
    weight: Tensor | float
    correction: Tensor | float


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

    def before(self, held: Held) -> Work[None]:
        """Remember the weights."""
        yield from ()
        held.weights = held.group.stack(held.group.parameters)

    def after(self, held: Held) -> Work[None]:
        """Turn the step that the base took.

        Stacks as large as the gradient are let go, or written into, as soon as they can be: how many there
        are at a time is what a step needs of memory.
        """
        taken, step_size, descent, average, moment = yield from self._taken(held)
        (moment,) = yield [Columns(moment)]
        direction = yield from self.direction(held, moment)
        del moment
        (direction,) = yield [Rows(direction)]
        direction = self._cautious(held, direction)
        size, length = yield from self._sizes(held, direction, step_size, descent)
        direction *= length
        move = yield from self.completed(held, direction, average, descent)
        del direction, descent, average
        decayed = self._decayed(held)
        along, move_size = yield [Sum(inner_product(taken - decayed, move)), Norm(norm(move))]
        assert held.gradient_norm is not None
        # Without a gradient (an expert that saw no token) the base's step fades out as its average does; so
        # must this one.
        turned = held.ready & length.isfinite() & size.isfinite() & (held.gradient_norm > 0)
        cosine = -along / (step_size * move_size)
        # A step that stays as it is has not been turned.
        held.cosine = torch.where(turned | cosine.isnan(), cosine, 1.0)
        held.without, held.turned = step_size, torch.where(turned, move_size, step_size)
        held.group.write(torch.where(turned, decayed - move, taken))

    def _decayed(self, held: Held) -> Tensor:
        """What the weights would be by the base's decoupled decay alone, ``[m, rows, columns]``."""
        assert held.weights is not None
        group = held.group
        decay = group.spread(base_settings.decoupled_decay(self.base, self._settings(held), group.parameters))
        return held.weights if isinstance(decay, float) and decay == 0 else held.weights * (1 - decay)

    def _taken(self, held: Held) -> Work[tuple[Tensor, Tensor, Tensor, Average, Tensor]]:
        """The base's step: the weights after it, its norm, and what it descends by the fresh average.

        Then that average, and ``m / c`` of it.
        """
        taken = held.group.stack(held.group.parameters)
        step = taken - self._decayed(held)
        own, average = self._averages(held)
        squares = self._squares(held)
        mean = squares.mean(held.group.rank_dim, keepdim=True)
        asked: list[Ask] = [held.norm_of_own, Norm(norm(step)), RankMean(mean)]
        if average.fresh is own:
            held.gradient_norm, step_size, mean = yield asked
            return taken, step_size, step.neg_(), average, self._mixed(held, average) / mean.sqrt()
        del step
        root = squares.sqrt_() + self._floor(held)
        del squares
        held.gradient_norm, step_size, mean, own_size = yield [*asked, Norm(norm(own / root))]
        moment = self._mixed(held, average) / mean.sqrt()
        return taken, step_size, self._descent(step_size / own_size, average, root), average, moment

    def direction(self, held: Held, moment: Tensor) -> Work[Tensor]:
        """What the step is turned to, from ``m / c``: ``[m, rows, columns]`` twice, with all of the rank."""
        yield from ()
        return held.curvature.apply(held.group, moment)

    def _cautious(self, held: Held, direction: Tensor) -> Tensor:
        """The direction, with entries made smaller that go up the newest gradient (Liang et al. 2024)."""
        if self.caution == 0:
            return direction
        against = direction * self._newest(held) < 0
        share = torch.ones_like(against, dtype=torch.float32)
        return direction.mul_(share.masked_fill_(against, 1 - self.caution))

    def _sizes(
        self, held: Held, direction: Tensor, step_size: Tensor, descent: Tensor
    ) -> Work[tuple[Tensor, Tensor]]:
        """The direction's norm, and what makes it as long as the step is to be; ``[m, 1, 1]`` each."""
        options, group = self.options, held.group
        ratio: Tensor | float = self.a_step_ratio if group.side == "A" else 1.0
        if options.step_length == "base":
            size, wanted = yield [Norm(norm(direction)), Norm(norm(descent))]
            return size, ratio * wanted / size
        (size,) = yield [Norm(norm(direction))]
        entries = held.curvature.ranks.step_rank[group.index] * group.width
        rms = _number(options.step_length) * base_settings.rate(self._settings(held))
        length = ratio * rms * entries.sqrt()[:, None, None] * (step_size > 0)  # zero where the base rested
        return size, length / size

    def completed(self, held: Held, move: Tensor, average: Average, descent: Tensor) -> Work[Tensor]:
        """What is taken off the weights, ``[m, rows, columns]`` like all that it is made of.

        Args:
            held: the matrices.
            move: the turned step; may be written into.
            average: the base's average of the gradient.
            descent: what the base itself takes off the weights, had it the fresh average; may be written
                into.
        """
        yield from ()
        return move

    def _descent(self, factor: Tensor, average: Average, root: Tensor) -> Tensor:
        """What the base would have taken off the weights, had its average been the fresh one.

        An Adam divides its average by the root of the squares, up to a factor that its own step tells.
        """
        return (average.fresh / root).mul_(factor * average.correction)

    def _floor(self, held: Held) -> Tensor | float:
        """What Adam adds to that root: ε, less its bias correction. It keeps rounding errors from steps."""
        settings = self._settings(held)
        eps = settings.get("eps", 0.0)
        if not isinstance(eps, int | float) or "betas" not in settings:
            return 0.0
        return eps * self._weight(held, float(settings["betas"][1])) ** 0.5

    def _weight(self, held: Held, decay: float) -> Tensor | float:
        """The sum of the gradients' weights in an average that keeps ``decay`` per step."""
        group = held.group
        return group.spread(
            base_moments.moment_weight(self.base, group.parameters, self._settings(held), decay)
        )

    def _squares(self, held: Held) -> Tensor:
        """The base's average of the squared gradient, ``[m, rows, columns]``; a one if it keeps none."""
        group = held.group
        squares = [base_moments.second_moment(self.base, p) for p in group.parameters]
        known = [s for s in squares if s is not None]
        if len(known) < len(squares):
            return held.gradient.new_ones(1, 1, 1)
        stacked = group.stack(known)
        return stacked.clamp_min_(torch.finfo(stacked.dtype).tiny)

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

    def _averages(self, held: Held) -> tuple[Tensor, Average]:
        """The base's average of the gradient ``[m, rows, columns]``, and as ``direction_momentum`` has it.

        What it becomes is also written back; the same tensor where it stays. A base that keeps none gets the
        newest gradient.
        """
        group, settings = held.group, self._settings(held)
        moments = [base_moments.first_moment(self.base, p) for p in group.parameters]
        known = [m for m in moments if m is not None]
        if len(known) < len(moments):
            newest = self._newest(held)
            return newest, Average(newest, 1.0, 1.0)
        own, decay, wanted = group.stack(known), base_settings.moment_decay(settings), self._momentum(held)
        weight = self._weight(held, wanted)
        if wanted == decay:
            return own, Average(own, weight, 1.0)
        fresh = self._freshened(held, own, wanted / decay)
        before = self._weight(held, decay)
        return own, Average(fresh, weight, before / weight)

    def _newest_share(self, held: Held) -> float:
        """The weight of the newest gradient in the fresh average."""
        settings = self._settings(held)
        return 1 - (settings["dampening"] if "dampening" in settings else self._momentum(held))

    def _mixed(self, held: Held, average: Average) -> Tensor:
        """The average as a mean, with the newest gradient mixed in: ``[m, rows, columns]``."""
        if self.gradient_share == 0:
            return average.fresh
        share = self.gradient_share
        return (average.fresh / average.weight).mul_(1 - share).add_(share * self._newest(held))

    def _freshened(self, held: Held, moment: Tensor, ratio: float) -> Tensor:
        """The base's average had it kept ``ratio`` times as much of its past, also written back.

        ``β m + (1 − β) g`` becomes ``ratio (β m + (1 − β) g) + (1 − ratio) g = ratio·β m + (1 − ratio·β) g``.
        """
        group, newest = held.group, self._newest(held)
        if dampening := self._settings(held).get("dampening", 0.0):
            newest = newest * (1 - dampening)
        dtype = torch.promote_types(newest.dtype, moment.dtype)  # a base may keep its average in another
        share = 1 - held.ready.to(dtype) * (1 - ratio)
        fresh = torch.lerp(newest.to(dtype), moment.to(dtype), share)
        base_moments.set_first_moment(self.base, group.parameters, group.split(fresh))
        return fresh


def _number(option: float | str | None) -> float:
    """An option that is a number here, since "base" has been dealt with."""
    assert isinstance(option, int | float)
    return float(option)
