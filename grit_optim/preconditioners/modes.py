"""The ways to use the curvature: what happens to a site's gradients and weights around the base optimizer's step.

A mode has three parts, each a no-op unless it says otherwise: ``refresh`` derives operators from the factors,
``before`` changes the gradient (or the coordinates) that the base is about to see, ``after`` what the base
made of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim import linalg
from grit_optim.base import transport
from grit_optim.curvature.bucket import Curvature
from grit_optim.options import moment_decay
from grit_optim.preconditioners.held import Held, inner_product, norm
from grit_optim.rank import pairs
from grit_optim.rank.coordinates import Move

_ORTHOGONAL_DAMPING = 0.01
"""Share of the mean squared singular value below which "spectral" takes a direction of the momentum for noise."""


class Preconditioner:
    """What every mode can do around the base's step; by itself nothing."""

    changes_coordinates = False
    """Whether ``refresh`` moves the base's state or the weights, so that it must not run while the mode is not in use."""
    holds_gradients = True
    """Whether the mode, or the guard against non-finite gradients, needs the gradients stacked."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    def refresh(self, curvature: Curvature) -> None:
        """Derive from the factors what the mode applies."""

    def before(self, held: Held) -> None:
        """Change the gradient that the base is about to see."""

    def as_the_base_sees(self, held: Held, gradient: Tensor) -> Tensor:
        """A gradient with respect to the weights ``[m, rows, columns]`` in the coordinates that the base works in."""
        return gradient

    def after(self, held: Held) -> None:
        """Change what the base made of it."""

    def abandon(self, held: Held) -> None:
        """Put back what :meth:`before` changed of the weights, after it or the base failed."""

    def to_plain_coordinates(self, curvature: Curvature) -> None:
        """Bring the base's state back to the coordinates of A and B themselves."""


class Identity(Preconditioner):
    """``"none"``: bit for bit the base optimizer."""

    holds_gradients = False


class Inverse(Preconditioner):
    """``"inverse"``: ``∇A ← Σ⁻¹ ∇A``, ``∇B ← ∇B Σ⁻¹`` with damped inverses, then the base's own step."""

    def refresh(self, curvature: Curvature) -> None:
        """Invert the factors."""
        curvature.refresh_inverses()

    def before(self, held: Held) -> None:
        """Multiply by the inverse, and keep each matrix's norm if asked to."""
        natural = held.curvature.apply(held.group, held.gradient)
        size, natural_size = norm(held.gradient), norm(natural)
        held.cosine = inner_product(natural, held.gradient) / (natural_size * size)
        held.without, held.turned = size, natural_size
        if held.curvature.options.preserve_norm:
            natural = natural * (size / natural_size).nan_to_num(0.0, posinf=0.0)
        held.gradient = torch.where(held.ready, natural, held.gradient)


class Eigenbasis(Preconditioner):
    """``"eigenbasis"``: the base works in the eigenbasis of its K-FAC factor, as SOAP does for Adam (Vyas et al. 2024)."""

    changes_coordinates = True

    def refresh(self, curvature: Curvature) -> None:
        """Turn to the new eigenbases and take the base's moments along."""
        self._turn_state(curvature, *curvature.refresh_eigenbases())

    def to_plain_coordinates(self, curvature: Curvature) -> None:
        """Turn the base's moments back."""
        old = curvature.a_operator, curvature.b_operator
        curvature.reset_operators()
        self._turn_state(curvature, *old)

    def _turn_state(self, curvature: Curvature, a_turn: Tensor, b_turn: Tensor) -> None:
        move = Move(a_turn, b_turn.mT, a_turn, b_turn.mT)
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

    def abandon(self, held: Held) -> None:
        """Put the weights back as they were."""
        if held.weights is not None:
            held.group.write(held.weights)


class Balanced(Preconditioner):
    """``"balanced"``: the pair's coordinates are changed so that both factors are diagonal; the step is the base's own."""

    changes_coordinates = True

    def refresh(self, curvature: Curvature) -> None:
        """Move weights, moments and factors to balanced coordinates."""
        pairs.balance(self.base, curvature, pairs.KEEP_RANK, curvature.damping)


class Steer(Preconditioner):
    """``"steer"``: the base steps, and its step is turned to the natural gradient's direction.

    For A the direction is ``−Σ^(−p) (m / c)``, with m the base's average of the gradient, which is made to
    forget as ``direction_momentum`` says and mixed with ``gradient_share`` of the newest gradient, c the root
    of its average of the squared gradient, averaged over the rank (one value per column of A, per row of B),
    and p ``kfac_power``; a base that keeps neither gets the gradient and 1. Entries that would go up the
    newest gradient lose the share ``caution``. ``step_length`` says how long the step is. Decoupled weight
    decay stays outside.
    """

    def refresh(self, curvature: Curvature) -> None:
        """Take the factors' inverses to the power p."""
        curvature.refresh_powers(curvature.options.kfac_power)

    def before(self, held: Held) -> None:
        """Remember the weights."""
        held.weights = held.group.stack(held.group.parameters)

    def after(self, held: Held) -> None:
        """Turn the step that the base took."""
        assert held.weights is not None
        assert held.gradient_norm is not None
        group = held.group
        taken = group.stack(group.parameters)
        decay = transport.decoupled_decay(self.base, self._settings(held), group.parameters)
        decayed = held.weights if isinstance(decay, float) and decay == 0 else held.weights * (1 - decay)
        step = taken - decayed
        direction = self._cautious(held, self.direction(held, self._scaled_moment(held)))
        step_size, size = norm(step), norm(direction)
        cosine = -inner_product(step, direction) / (step_size * size)
        target = self._length(held, step_size)
        length = target / size
        # Without a gradient (an expert that saw no token) the base's step fades out as its average does; so
        # must this one.
        turned = held.ready & length.isfinite() & (held.gradient_norm > 0)
        # A step that stays as it is has not been turned.
        held.cosine = torch.where(turned | cosine.isnan(), cosine, 1.0)
        held.without, held.turned = step_size, torch.where(turned, target, step_size)
        group.write(torch.where(turned, decayed - length * direction, taken))

    def direction(self, held: Held, moment: Tensor) -> Tensor:
        """What the step is turned to, from ``m / c``: ``[m, rows, columns]`` twice."""
        return held.curvature.apply(held.group, moment)

    def _cautious(self, held: Held, direction: Tensor) -> Tensor:
        """The direction with its entries that go up the newest gradient made smaller (Liang et al. 2024 drop them)."""
        caution = held.curvature.options.caution
        if caution == 0:
            return direction
        return torch.where(direction * self._newest(held) < 0, 1 - caution, 1.0) * direction

    def _length(self, held: Held, base_length: Tensor) -> Tensor:
        """Frobenius norm that each step is to have, ``[m, 1, 1]``; zero where the base did not move."""
        options, group, settings = held.curvature.options, held.group, self._settings(held)
        ratio: Tensor | float = options.a_step_ratio if group.side == "A" else 1.0
        if options.step_length == "base":
            decay, wanted = moment_decay(settings), self._momentum(held)
            if wanted != decay:  # the base's bias correction knows nothing of what was freshened
                ratio *= transport.freshened_correction(
                    self.base, group.parameters[0], settings, decay, wanted
                )
            return ratio * base_length
        entries = held.curvature.step_rank[group.index] * group.width
        rms = float(options.step_length) * transport.rate(settings)
        return ratio * rms * entries.sqrt()[:, None, None] * (base_length > 0)

    def _scaled_moment(self, held: Held) -> Tensor:
        """``m / c``, ``[m, rows, columns]``."""
        group = held.group
        moments = [
            m for m in (transport.first_moment(self.base, p) for p in group.parameters) if m is not None
        ]
        squares = [
            s for s in (transport.second_moment(self.base, p) for p in group.parameters) if s is not None
        ]
        complete = len(group.parameters)
        moment = self._mixed(held, group.stack(moments)) if len(moments) == complete else self._newest(held)
        if len(squares) < complete:
            return moment
        mean_square = group.stack(squares).mean(group.rank_dim, keepdim=True)
        return moment / mean_square.clamp_min(torch.finfo(moment.dtype).tiny).sqrt()

    def _settings(self, held: Held) -> dict[str, Any]:
        """The base's parameter group."""
        return self.base.param_groups[held.group.param_group]

    def _newest(self, held: Held) -> Tensor:
        """The newest gradient of what the base descends, the penalty of a coupled weight decay included."""
        settings = self._settings(held)
        newest = -held.gradient if settings.get("maximize", False) else held.gradient
        decay = transport.coupled_decay(self.base, settings)
        return newest + decay * held.weights if decay and held.weights is not None else newest

    def _momentum(self, held: Held) -> float:
        """What the average that gives the direction keeps per step."""
        own, wanted = moment_decay(self._settings(held)), held.curvature.options.direction_momentum
        return own if wanted == "base" or own == 0 else float(wanted)

    def _mixed(self, held: Held, moment: Tensor) -> Tensor:
        """The mean gradient, by the base's average ``[m, rows, columns]``, with the newest gradient mixed in."""
        options, group = held.curvature.options, held.group
        settings = self._settings(held)
        decay, wanted = moment_decay(settings), self._momentum(held)
        if wanted != decay:
            moment, decay = self._freshened(held, moment, wanted / decay), wanted
        if options.gradient_share == 0:
            return moment
        weight = transport.moment_weight(self.base, group.parameters[0], settings, decay)
        return (1 - options.gradient_share) * (moment / weight) + options.gradient_share * self._newest(held)

    def _freshened(self, held: Held, moment: Tensor, ratio: float) -> Tensor:
        """The base's average as it would be had it kept ``ratio`` times as much of its past, for now and for the next step.

        ``β m + (1 − β) g`` becomes ``ratio (β m + (1 − β) g) + (1 − ratio) g = ratio·β m + (1 − ratio·β) g``.
        """
        group, newest = held.group, self._newest(held)
        if dampening := self._settings(held).get("dampening", 0.0):
            newest = newest * (1 - dampening)
        fresh = torch.lerp(newest, moment, 1 - held.ready.to(moment.dtype) * (1 - ratio))
        transport.set_first_moment(self.base, group.parameters, fresh.unbind())
        return fresh


class Spectral(Steer):
    """``"spectral"``: as "steer", with the direction of steepest descent in the spectral norm of Fisher coordinates.

    With ``P = Σ^(−p/2)`` and ``X = P (m / c)``: for A the direction is ``−P (X Xᵀ)^(−1/2) X``. Muon (Jordan
    et al. 2024) orthogonalises the momentum of a whole weight matrix; here the r×r side is enough, the
    curvature of the tokens sets the coordinates, and nothing is kept between steps but the factors.
    """

    def refresh(self, curvature: Curvature) -> None:
        """Take the factors' inverses to the power p/2."""
        curvature.refresh_powers(curvature.options.kfac_power / 2)

    def direction(self, held: Held, moment: Tensor) -> Tensor:
        """``P (X Xᵀ)^(−1/2) X`` for A, ``X (Xᵀ X)^(−1/2) P`` for B."""
        group, curvature = held.group, held.curvature
        inner = curvature.apply(group, moment)
        gram = inner @ inner.mT if group.side == "A" else inner.mT @ inner
        mask = curvature.mask[group.index]
        strength = linalg.damping_strength(gram, _ORTHOGONAL_DAMPING, relative=True, rank=mask.sum(-1))
        whitening = linalg.damped_root(gram, strength, 2, _ORTHOGONAL_DAMPING)[0]
        whitening = linalg.block(whitening, mask)  # what was given up stays exactly zero
        return curvature.apply(group, whitening @ inner if group.side == "A" else inner @ whitening)


_MODES: dict[str, type[Preconditioner]] = {
    "none": Identity,
    "inverse": Inverse,
    "eigenbasis": Eigenbasis,
    "balanced": Balanced,
    "steer": Steer,
    "spectral": Spectral,
}


def make_preconditioner(name: str, base: Optimizer) -> Preconditioner:
    """The mode of that name (see GritOptimizer's ``precondition``)."""
    return _MODES[name](base)
