"""When each part of a step is due. Steps are counted from 0, and only those in which a tap fired are counted.

With ``adaptive_schedule`` the periods follow the loss. The losses of every :data:`WINDOW` steps are compared
in two halves, as the GRIT library does:

- the second half's mean is more than 1 % below the first's: the curvature changes little, periods are 1.5
  times the given ones;
- else, the loss has stalled: 0.75 times;
- the damping is the given one times the loss's noise in units of its noise at the start, between ¼ and 4.
  Noise is the standard deviation of the differences of successive losses, over √2 and the mean loss; a steady
  fall does not raise it.

A period so never leaves [0.75, 1.5] times what was asked for (and never falls below 1), the damping never [¼,
4] times. Decisions are taken every half window and come into force half a window later: the numbers travel to
the host meanwhile, and what is decided depends on the losses alone, not on when they arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grit_optim.integrity.fields import Fields, number, optional, record, several, whole
from grit_optim.messages import warn
from grit_optim.options import ScheduleOptions
from grit_optim.profiling import HostCopy

WINDOW = 20
HALF = WINDOW // 2
LONGER, SHORTER, FALL = 1.5, 0.75, 0.99
DAMPING_BOUND = 4.0

_TRACKED = (
    "period_scale",
    "damping_scale",
    "last_refresh",
    "last_reprojection",
    "previous_mean",
    "first_noise",
)


def every(step: int, period: int, warmup: int = 0) -> bool:
    """Whether work is due in ``step`` that repeats every ``period`` steps once ``warmup`` steps are done."""
    return step >= warmup and step % period == 0


def ramp(step: int, warmup: int) -> float:
    """Share of its full strength that something has in ``step``, growing over ``warmup`` steps."""
    return min(1.0, step / warmup) if warmup else 1.0


def capture_due(step: int, period: int) -> bool:
    """Whether the taps record in ``step``.

    B starts at zero, so δ = s·Bᵀg is zero throughout step 0 and nothing is learnt from it; the period
    therefore starts at step 1.
    """
    return step == 0 or (step - 1) % period == 0


class Schedule:
    """How many steps are done, and when refresh and reprojection are due.

    Attributes:
        steps: steps done, or the number of the step that is under way, counted from 0.
        period_scale: what the periods are multiplied by.
        damping_scale: what the damping is multiplied by.
        last_refresh: step of the latest refresh, followed with ``adaptive_schedule`` only; None before the
            first.
        last_reprojection: step of the latest reprojection, followed with ``adaptive_schedule`` only; None
            before the first.
        previous_mean: mean loss of the half window before, None until there was one.
        first_noise: relative noise of the first whole half window, the unit of the later ones.
    """

    def __init__(self, options: ScheduleOptions) -> None:
        self._options = options
        self.steps = 0
        self._start()

    def _start(self) -> None:
        self.period_scale = self.damping_scale = 1.0
        self.last_refresh: int | None = None
        self.last_reprojection: int | None = None
        self.previous_mean: float | None = None
        self.first_noise: float | None = None
        self._losses: list[Tensor | float] = []
        self._travelling: HostCopy | None = None
        self._without = 0

    @property
    def warming_up(self) -> bool:
        """Whether the curvature is gathered but not applied yet."""
        return self.steps < self._options.ng_warmup_steps

    @property
    def follows_loss(self) -> bool:
        """Whether the schedule needs the losses."""
        return self._options.adaptive_schedule

    @property
    def kfac_update_freq(self) -> int:
        """Steps between refreshes now."""
        assert self._options.kfac_update_freq is not None
        return self._scaled(self._options.kfac_update_freq)

    @property
    def reprojection_freq(self) -> int:
        """Steps between reprojections now."""
        return self._scaled(self._options.reprojection_freq)

    @property
    def refreshes_seldom(self) -> bool:
        """Whether factors move on between two refreshes."""
        return self.follows_loss or self.kfac_update_freq > 1

    def _scaled(self, period: int) -> int:
        return max(1, int(period * self.period_scale))

    def refresh_due(self) -> bool:
        """Whether the operators are to be derived anew in this step; to be asked once a step."""
        if not self.follows_loss:
            return every(self.steps, self.kfac_update_freq)
        due = self.last_refresh is None or self.steps - self.last_refresh >= self.kfac_update_freq
        self.last_refresh = self.steps if due else self.last_refresh
        return due

    def reprojection_due(self) -> bool:
        """Whether the pairs are to be reprojected in this step; to be asked once a step."""
        warmup = self._options.reprojection_warmup_steps
        if not self.follows_loss:
            return every(self.steps, self.reprojection_freq, warmup)
        last = self.last_reprojection
        due = self.steps >= warmup and (last is None or self.steps - last >= self.reprojection_freq)
        self.last_reprojection = self.steps if due else last
        return due

    def advance(self, loss: Tensor | float | None) -> None:
        """End a step with its loss; one without changes nothing, and a window without any is warned of."""
        self.steps += 1
        if not self.follows_loss:
            return
        if loss is None:
            self._without += 1
            if self._without == WINDOW:
                warn(
                    f"adaptive_schedule=True has been told no loss in {WINDOW} steps, so nothing adapts. "
                    "Call optimizer.observe(loss) before step(), pass step() a closure, or let the model's "
                    "output carry a `loss`"
                )
            return
        self._losses.append(loss)
        if len(self._losses) < HALF:
            return
        half, self._losses = self._losses, []
        if self._travelling is not None:
            self._decide(*self._travelling.read()["moments"].tolist())
        self._travelling = HostCopy({"moments": _moments(half)})

    def _decide(self, mean: float, noise: float) -> None:
        """Set both scales from one half window's mean loss and noise."""
        previous, self.previous_mean = self.previous_mean, mean
        if not (math.isfinite(mean) and math.isfinite(noise)):
            return
        relative = noise / abs(mean) if mean else 0.0
        if self.first_noise is None:
            self.first_noise = relative
        if self.first_noise > 0:
            self.damping_scale = min(DAMPING_BOUND, max(1 / DAMPING_BOUND, relative / self.first_noise))
        if previous is not None and math.isfinite(previous):
            self.period_scale = LONGER if mean < previous - (1 - FALL) * abs(previous) else SHORTER

    def in_force(self) -> dict[str, int]:
        """The periods now, for records."""
        return {"kfac_update_freq": self.kfac_update_freq, "reprojection_freq": self.reprojection_freq}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint (reads the losses that have not been decided on)."""
        travelling = self._travelling.read()["moments"].tolist() if self._travelling is not None else None
        pace = {
            **{name: getattr(self, name) for name in _TRACKED},
            "losses": [float(loss) for loss in self._losses],
            "travelling": travelling,
        }
        return {"steps": self.steps, "pace": pace}

    @staticmethod
    def saved_fields() -> Fields:
        """What a checkpoint may hold under the names of :meth:`state_dict`."""
        loss, step = number(finite=False), optional(whole())
        scale = number(low=1 / DAMPING_BOUND, high=DAMPING_BOUND)
        pace = {
            "period_scale": scale,
            "damping_scale": scale,
            "last_refresh": step,
            "last_reprojection": step,
            "previous_mean": optional(loss),
            "first_noise": optional(loss),
            "losses": several(loss),
            "travelling": optional(several(loss, 2)),
        }
        return {"steps": whole(), "pace": record({}, pace)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, or start anew from an empty one; fixed periods need the steps alone."""
        self.steps = state.get("steps", 0)
        self._start()
        if not self.follows_loss:
            return
        pace = state.get("pace", {})
        for name in _TRACKED:
            setattr(self, name, pace.get(name, getattr(self, name)))
        self._losses = list(pace.get("losses", []))
        if (travelling := pace.get("travelling")) is not None:
            self._travelling = HostCopy(
                {"moments": torch.tensor(travelling, dtype=torch.float64, device="cpu")}
            )


def _moments(losses: list[Tensor | float]) -> Tensor:
    """Mean and noise of half a window's losses, ``[2]`` on their device: see the module."""
    device = next((loss.device for loss in losses if isinstance(loss, Tensor)), torch.device("cpu"))
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    numbers = [
        loss.to(device, dtype)
        if isinstance(loss, Tensor)
        else torch.full((), loss, dtype=dtype, device=device)
        for loss in losses
    ]
    stacked = torch.stack(numbers)
    return torch.stack((stacked.mean(), stacked.diff().std() / math.sqrt(2)))
