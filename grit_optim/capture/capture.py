"""The statistics of a step's forward and backward passes, from the taps of this process or of all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grit_optim.capture import processes
from grit_optim.capture.diagnosis import SiteReport, TapWatch, inspect, tell_of, warn_of
from grit_optim.capture.gradients import add_gradients
from grit_optim.capture.sums import Sums
from grit_optim.capture.taps import Taps
from grit_optim.capture.token_kinds import TokenKinds
from grit_optim.integrity.fields import Fields, record, several, some_text
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.site import Site
from grit_optim.options import CaptureOptions
from grit_optim.processes.group import Processes
from grit_optim.profiling import StageTimes
from grit_optim.schedules import capture_due

_Gathered = tuple[list[Sums], list[SiteReport], Callable[[], bool]]
"""Sums, reports of the taps that do not see what they should, and whether any tap has fired."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was gathered since the last step.

    Attributes:
        sums: sums over tokens, one entry per bucket.
        recorded: whether this step's statistics were recorded (``cov_update_freq``). If not, nothing is in
            the sums.
        by_gradients: for each bucket, the sites whose sums come from their gradients, boolean ``[S]``.
        changed: names of the sites whose sums come from their gradients for the first time.
    """

    sums: list[Sums]
    recorded: bool
    by_gradients: list[Tensor]
    changed: frozenset[str]


class Capture:
    """The taps of all sites, the sites that need none, and the watch that finds those.

    Attributes:
        watch: compares taps and gradients in the first steps.
        by_gradients: names of the sites whose curvature comes from their gradients.
    """

    def __init__(
        self,
        options: CaptureOptions,
        times: StageTimes,
        together: Processes,
        weights: str | Mapping[str, float] | None = None,
    ) -> None:
        self.watch = TapWatch()
        self.by_gradients: frozenset[str] = frozenset()
        self._options = options
        self._times = times
        self._processes = together
        self._kinds = None if weights is None else TokenKinds(weights)
        self._taps = Taps(options.max_tokens, times, together.note_forward, together.sharded, self._kinds)
        self._masks: list[Tensor] = []
        self._begun = False

    def attach(self, sites: Sequence[Site], buckets: Sequence[Bucket]) -> None:
        """Work on these sites, and no others, from now on. What was gathered of them is kept."""
        names = {site.name for site in sites}
        known = names if self._options.capture == "gradients" else self.by_gradients & names
        self._attach(sites, buckets, frozenset(known) | {site.name for site in sites if site.untapped})

    def _attach(self, sites: Sequence[Site], buckets: Sequence[Bucket], by_gradients: frozenset[str]) -> None:
        self._taps.attach(sites, buckets, by_gradients)
        self.by_gradients = by_gradients
        self._masks = _masks(buckets, by_gradients)
        if any(bucket.device.type == "meta" for bucket in buckets):
            self.watch.stop()  # there are no values to compare, or to be zero
            self._begun = True

    def watch_tokens(self, model: nn.Module | None, sites: Sequence[Site]) -> None:
        """Tell the kinds of the tokens of ``model`` apart from now on, where ``modality_weights`` needs it.

        Raises:
            ValueError: the model has no tokens of several kinds, or one whose share is not given.
        """
        if self._kinds is not None:
            self._kinds.attach(model, sites)

    def tell_tokens(self, mask: Tensor) -> None:
        """Take the user's word for the tokens of the coming pass; see :meth:`TokenKinds.tell`.

        Raises:
            TypeError: it is no boolean tensor.
            ValueError: it has another number of dimensions, or kinds of tokens are not told apart.
        """
        if self._kinds is None:
            raise ValueError(
                "observe_tokens() tells pictures' tokens from text for modality_weights, which is not set; "
                "build the optimizer with modality_weights='equal' or shares, or leave the call out"
            )
        self._kinds.tell(mask)

    def collect(self) -> Statistics | None:
        """The statistics gathered since the last step; None if there are none in any process."""
        with self._times("fold"):
            taps, before = self._taps, self.by_gradients
            if self._processes.left_out:
                taps.discard()
                return None
            sums, found, fired = self._of_all() if self._together else self._own()
            self._judge(found, sums)
            if not (self._has_gradients() or fired()):
                return None
            self._processes.trained()
            if taps.active and self.by_gradients:
                for bucket, total in zip(taps.gathered.buckets, sums, strict=True):
                    add_gradients(total, bucket, self.by_gradients)
            return Statistics(sums, taps.active, self._masks, self.by_gradients - before)

    @property
    def _together(self) -> bool:
        """Whether processes add up what their taps saw. The gradients are everybody's anyway."""
        return self._processes.size > 1 and len(self.by_gradients) < len(self._taps.sites)

    def exchange(self) -> None:
        """Take part in what the processes add up in a step, with nothing of this one's own."""
        if self._together:
            nothing, count = self._taps.collect({}), len(self._taps.sites)
            processes.add_up(nothing, [0] * count, [None] * count, self._processes.group)

    def _own(self) -> _Gathered:
        taps = self._taps
        alive, fired = taps.settle(), any(taps.gathered.fired)
        if self._options.capture == "auto":
            self.watch.notice(self._quiet())
        found = self.watch.look(self.check)
        return taps.collect(alive), found, lambda: fired

    def _of_all(self) -> _Gathered:
        """As :meth:`_own`, summed over all processes; every process has to call it."""
        taps = self._taps
        alive, gathered = taps.settle(), taps.gathered
        fired, rounding = list(gathered.fired), gathered.rounding
        inner = [gathered.inner(i) if self.watch.steps_left else None for i in range(len(fired))]
        together = processes.add_up(taps.collect(alive), fired, inner, self._processes.group)

        def reports() -> list[SiteReport]:
            """What the check of the taps finds over the tokens of all processes."""
            columns = (t.tolist() for t in (together.fired, together.inner, together.known))
            seen = [(int(n), value if known else None) for n, value, known in zip(*columns, strict=True)]
            return inspect(taps.sites, seen, rounding, by_gradients=self.by_gradients)

        # A process whose own taps fired knows the answer without waiting for the device.
        return together.sums, self.watch.look(reports), lambda: any(fired) or bool(together.fired.any())

    def _quiet(self) -> list[str]:
        """The sites that have gradients, and whose taps have not fired although they should."""
        fired, sites = self._taps.gathered.fired, self._taps.sites
        silent = [site for site, count in zip(sites, fired, strict=True) if not count]
        return [site.name for site in silent if site.name not in self.by_gradients and site.has_gradient]

    def _has_gradients(self) -> bool:
        """Whether a site whose curvature comes from its gradients has one.

        Before the first step zeros are none: a distributed checkpoint steps with them to set the base's state
        up. Later they are not looked for, since that would wait for the device.
        """
        sites = [site for site in self._taps.sites if site.name in self.by_gradients and site.has_gradient]
        if sites and not self._begun:
            self._begun = any(bool(w.grad.any()) for s in sites for w in (s.a, s.b) if w.grad is not None)
            return self._begun
        return bool(sites)

    def _judge(self, found: Sequence[SiteReport], sums: Sequence[Sums]) -> None:
        """Have the sites whose taps do not see what they should go over to their gradients, or warn of them.

        Args:
            found: the reports of these sites.
            sums: of this step, from which theirs are taken out.
        """
        if not found:
            return
        if self._options.capture == "taps":
            self.watch.stop()
            warn_of(found)
            return
        tell_of(found)
        buckets, names = self._taps.gathered.buckets, {report.name for report in found}
        for mask, total in zip(_masks(buckets, names), sums, strict=True):
            total.leave_out(mask)
        self._attach(self._taps.sites, buckets, self.by_gradients | names)

    def check(self) -> list[SiteReport]:
        """Compare taps and gradients now: one report per site."""
        taps, alone = self._taps, self._processes.size == 1
        return inspect(taps.sites, taps.seen(), taps.gathered.rounding, alone, self.by_gradients)

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
        """Remove the taps, and what watches the kinds of tokens."""
        self._taps.close()
        if self._kinds is not None:
            self._kinds.detach()

    def state_dict(self) -> dict[str, Any]:
        """What decides which tokens of the next step are taken, and from where."""
        own = {"by_gradients": sorted(self.by_gradients), "watch": self.watch.state_dict()}
        return {**self._taps.state_dict(), **own}

    @staticmethod
    def saved_fields() -> Fields:
        """What a checkpoint may hold under the names of :meth:`state_dict`."""
        own = {"by_gradients": several(some_text), "watch": record({}, TapWatch.saved_fields())}
        return {**Taps.saved_fields(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, or start anew from an empty one."""
        self.discard()
        self._taps.load_state_dict(state)
        self.watch.load_state_dict(state.get("watch", {}))
        if self._options.capture == "auto":
            self.by_gradients = frozenset(state.get("by_gradients", self.by_gradients))
        self.attach(self._taps.sites, self._taps.gathered.buckets)


def _masks(buckets: Sequence[Bucket], names: Collection[str]) -> list[Tensor]:
    """Which sites of each bucket are among ``names``, boolean ``[S]``."""
    return [
        torch.tensor([name in names for name in bucket.names()], dtype=torch.bool, device=bucket.device)
        for bucket in buckets
    ]
