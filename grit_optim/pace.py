"""The adaptive schedule: how the loss sets the pace of refreshes and reprojections, and the damping.

The losses of every :data:`WINDOW` steps are compared in two halves, as the GRIT library does:

- the second half's mean is more than 1 % below the first's: curvature changes little, periods are 1.5 times
  the given ones;
- else, the loss has stalled: 0.75 times;
- the damping is the given one times the loss's noise in units of its noise at the start, between ¼ and 4.
  Noise is the standard deviation of the differences of successive losses, over √2 and the mean loss; a steady
  fall does not raise it.

So a period never leaves [0.75, 1.5] times what was asked for (and never falls below 1), damping never [¼, 4]
times. Decisions are taken every half window and come into force half a window later: the numbers travel to
the host meanwhile, and what is decided depends on the losses alone, not on when they arrive.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from grit_optim import schedules as schedule
from grit_optim.messages import warn
from grit_optim.options import Options
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


class Pace:
    """When refresh and reprojection are due, and how much of the damping is in force.

    Attributes:
        period_scale: what the periods are multiplied by.
        damping_scale: what the damping is multiplied by.
        previous_mean: mean loss of the half window before, None until there was one.
        first_noise: relative noise of the first whole half window, the unit of the later ones.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.period_scale = self.damping_scale = 1.0
        self.last_refresh: int | None = None
        self.last_reprojection: int | None = None
        self.previous_mean: float | None = None
        self.first_noise: float | None = None
        self._losses: list[Tensor | float] = []
        self._travelling: HostCopy | None = None
        self._without = 0

    @property
    def kfac_update_freq(self) -> int:
        """Steps between refreshes now."""
        return self._scaled(self._options.kfac_update_freq)

    @property
    def reprojection_freq(self) -> int:
        """Steps between reprojections now."""
        return self._scaled(self._options.reprojection_freq)

    def _scaled(self, period: int) -> int:
        return max(1, int(period * self.period_scale))

    def refresh_due(self, step: int) -> bool:
        """Whether the operators are to be derived anew in ``step``, counted from 0."""
        if not self._options.adaptive_schedule:
            return schedule.every(step, self._options.kfac_update_freq)
        due = self.last_refresh is None or step - self.last_refresh >= self.kfac_update_freq
        self.last_refresh = step if due else self.last_refresh
        return due

    def reprojection_due(self, step: int) -> bool:
        """Whether the pairs are to be reprojected in ``step``, counted from 0."""
        warmup = self._options.reprojection_warmup_steps
        if not self._options.adaptive_schedule:
            return schedule.every(step, self._options.reprojection_freq, warmup)
        last = self.last_reprojection
        due = step >= warmup and (last is None or step - last >= self.reprojection_freq)
        self.last_reprojection = step if due else last
        return due

    def take(self, loss: Tensor | float | None) -> None:
        """Take the loss of a step; a step without one changes nothing, and a window without any is warned of."""
        if not self._options.adaptive_schedule:
            return
        if loss is None:
            self._without += 1
            if self._without == WINDOW:
                warn(
                    f"adaptive_schedule=True has been told no loss in {WINDOW} steps, so nothing adapts: call "
                    "optimizer.observe(loss) before step(), pass step() a closure, or let the model's output carry a `loss`",
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

    def state(self) -> dict[str, Any]:
        """What is in force, for records."""
        damping = self._options.kfac_damping * self.damping_scale
        return {
            "kfac_update_freq": self.kfac_update_freq,
            "reprojection_freq": self.reprojection_freq,
            "kfac_damping": damping,
        }

    def pack(self) -> dict[str, Any]:
        """For a checkpoint (reads the losses that have not been decided on)."""
        travelling = self._travelling.read()["moments"].tolist() if self._travelling is not None else None
        return {
            **{name: getattr(self, name) for name in _TRACKED},
            "losses": [float(loss) for loss in self._losses],
            "travelling": travelling,
        }

    def unpack(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint; without an adaptive schedule there is nothing to go on with."""
        if not self._options.adaptive_schedule:
            return
        for name in _TRACKED:
            setattr(self, name, saved.get(name, getattr(self, name)))
        self._losses = list(saved.get("losses", []))
        travelling = saved.get("travelling")
        moments = None if travelling is None else {"moments": torch.tensor(travelling, dtype=torch.float64)}
        self._travelling = HostCopy(moments) if moments is not None else None


def _moments(losses: list[Tensor | float]) -> Tensor:
    """Mean, and standard deviation of successive differences over √2, of half a window's losses: ``[2]``, on their device."""
    device = next((loss.device for loss in losses if isinstance(loss, Tensor)), torch.device("cpu"))
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    stacked = torch.stack([torch.as_tensor(loss, dtype=dtype).to(device) for loss in losses])
    return torch.stack((stacked.mean(), stacked.diff().std() / math.sqrt(2)))
