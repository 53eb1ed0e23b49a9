"""The statistics of a step's forward and backward passes, from the taps of this process or of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.hooks import RemovableHandle

from grit_optim.capture import processes
from grit_optim.capture.diagnosis import SiteReport, TapWatch, inspect
from grit_optim.capture.sums import Sums
from grit_optim.capture.taps import Taps
from grit_optim.integrity.fields import Fields
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.site import Site
from grit_optim.options import CaptureOptions
from grit_optim.profiling import StageTimes
from grit_optim.schedules import capture_due


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was gathered since the last step.

    Attributes:
        sums: sums over tokens, one entry per bucket.
        recorded: whether this step's tokens were recorded (``cov_update_freq``). If not, no tokens are in the
            sums.
    """

    sums: list[Sums]
    recorded: bool


class Capture:
    """The taps of all sites, and the watch that compares them with the gradients.

    Attributes:
        watch: makes the comparison in the first steps.
    """

    def __init__(self, options: CaptureOptions, times: StageTimes) -> None:
        self.watch = TapWatch()
        self._options = options
        self._times = times
        self._taps = Taps(options.max_tokens, times)

    def attach(self, sites: Sequence[Site], buckets: Sequence[Bucket]) -> None:
        """Tap these sites, and no others, from now on. What was gathered of them is kept."""
        if any(bucket.device.type == "meta" for bucket in buckets):
            self.watch.stop()  # there are no values to compare
        self._taps.attach(sites, buckets)

    def collect(self) -> Statistics | None:
        """The statistics gathered since the last step; None if no tap has fired in any process."""
        with self._times("fold"):
            sums = self._own() if processes.size() == 1 else self._of_all()
        return None if sums is None else Statistics(sums, self._taps.active)

    def _own(self) -> list[Sums] | None:
        alive = self._taps.settle()
        self.watch.look(self.check)
        if not any(self._taps.gathered.fired):
            self.discard()
            return None
        return self._taps.collect(alive)

    def _of_all(self) -> list[Sums] | None:
        """As :meth:`_own`, summed over all processes; every process has to call it."""
        taps = self._taps
        if not taps.sites:
            return None
        alive, gathered = taps.settle(), taps.gathered
        fired, rounding = list(gathered.fired), gathered.rounding
        inner = [gathered.inner(i) if self.watch.steps_left else None for i in range(len(fired))]
        together = processes.add_up(taps.collect(alive), fired, inner)

        def reports() -> list[SiteReport]:
            """What the check of the taps finds over the tokens of all processes."""
            columns = (t.tolist() for t in (together.fired, together.inner, together.known))
            seen = [(int(n), value if known else None) for n, value, known in zip(*columns, strict=True)]
            return inspect(taps.sites, seen, rounding)

        self.watch.look(reports)
        # A process whose own taps fired knows the answer without waiting for the device.
        return together.sums if any(fired) or together.fired.any() else None

    def check(self) -> list[SiteReport]:
        """Compare taps and gradients now: one report per site."""
        taps = self._taps
        return inspect(taps.sites, taps.seen(), taps.gathered.rounding, compare=processes.size() == 1)

    def discard(self) -> None:
        """Forget what was gathered since the last step."""
        self._taps.discard()

    @property
    def hooks(self) -> list[RemovableHandle]:
        """The handles of all hooks: what stands on the model must not be forgotten, whatever is undone."""
        return self._taps.hooks

    @property
    def waiting(self) -> list[int]:
        """How many backward passes of a pair each bucket has yet to add up."""
        return self._taps.gathered.waiting

    def plan(self, step: int) -> None:
        """Decide whether the tokens of step number ``step`` are recorded."""
        self._taps.record_next(capture_due(step, self._options.cov_update_freq))

    def close(self) -> None:
        """Remove the taps."""
        self._taps.close()

    def state_dict(self) -> dict[str, Any]:
        """What decides which tokens of the next step are taken."""
        return self._taps.state_dict()

    @staticmethod
    def saved_fields() -> Fields:
        """What a checkpoint may hold under the names of :meth:`state_dict`."""
        return Taps.saved_fields()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, or start anew from an empty one."""
        self.discard()
        self._taps.load_state_dict(state)
