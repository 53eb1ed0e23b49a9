"""Taps on the outputs of ``lora_A``: one hook per site gives h in the forward and δ in the backward pass.

The output of ``lora_A`` is h = A x, and the gradient that arrives there is δ = ∂L/∂h. One tap gives both
K-FAC factors, without any product of width d_in or d_out. A tensor hook fires exactly once for each backward
pass through a forward pass, whatever activation checkpointing recomputes.

That a hook fires does not make a training step. ``torch.autograd.grad`` fires it too, and leaves ``.grad``
alone. So h and δ count once the same backward pass has accumulated into the gradient of A or B, and for as
long as that gradient is there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from grit_optim.capture.bypass import BypassWatch
from grit_optim.capture.gathered import Gathered, Share
from grit_optim.capture.hooks import GradientTap, Tap, at_the_end, remove, remove_inert_taps
from grit_optim.capture.kept_gradients import KeptGradients, nonzero
from grit_optim.capture.sums import Sums
from grit_optim.capture.token_kinds import TokenKinds
from grit_optim.integrity.fields import Fields, whole
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.site import Site, held_by
from grit_optim.processes import shards
from grit_optim.profiling import StageTimes

MOST_PASSES = 16
"""Backward passes under way at once, one in another (reentrant checkpointing). Older ones have failed."""


@dataclass
class _Pass:
    """One backward pass that is under way.

    Attributes:
        looked: positions of sites whose gradients have been looked at, before the pass changes them.
        reached: positions and sides whose gradients it has accumulated into.
        waiting: by position, h, the tokens' kinds and δ of sites whose gradients it has not reached yet. h is
            None while tokens are not recorded.
    """

    looked: set[int] = field(default_factory=set)
    reached: set[tuple[int, int]] = field(default_factory=set)
    waiting: dict[int, list[tuple[Tensor | None, Tensor | int, Tensor]]] = field(default_factory=dict)


class Taps:
    """Gathers h and δ of the tokens that the taps see, as far as they reach gradients.

    Args:
        max_tokens: tokens per site and step that enter the sums, evenly spaced; None: all.
        times: where the seconds spent in hooks are counted.
        note_forward: called in each forward pass of a site that gets a gradient.
        sharded: tells whether FSDP2 manages the model, so that copies are in the places of A and B.
        kinds: tells the kinds of tokens apart; None: they are not.

    Attributes:
        sites: the sites that are tapped, in the model's order.
        gathered: what counts since the last :meth:`collect`.
        active: whether tokens are recorded. Taps that fire are counted in any case.
        calls_per_step: how often the busiest tap fired in the last step, among which ``max_tokens`` are
            shared out.
        offset: steps collected so far, which shifts the first token that is taken.
        bypass: notices steps around the optimizer.
        hooks: the handles of all hooks, one list for as long as the taps live.
    """

    def __init__(
        self,
        max_tokens: int | None,
        times: StageTimes,
        note_forward: Callable[[], None],
        sharded: Callable[[], bool],
        kinds: TokenKinds | None = None,
    ) -> None:
        self.sites: list[Site] = []
        self.gathered = Gathered([], [])
        self.max_tokens, self.kinds = max_tokens, kinds
        self.active = True
        self.calls_per_step = 1
        self.offset = 0
        self.bypass = BypassWatch()
        self._times = times
        self._note_forward, self._sharded = note_forward, sharded
        self._lock = threading.RLock()  # sites on several devices have a backward thread each
        self._weights: list[tuple[Tensor, Tensor]] = []
        self._positions: dict[int, int] = {}
        self._hooked: set[tuple[int, int]] = set()  # ids of matrices, and sides
        self.hooks: list[RemovableHandle] = []
        self._gradients = KeptGradients([])
        self._passes: dict[int, _Pass] = {}
        weakref.finalize(self, remove, self.hooks).atexit = False

    def attach(
        self, sites: Sequence[Site], buckets: Sequence[Bucket], untapped: Collection[str] = ()
    ) -> None:
        """Tap these sites, and no others, from now on.

        What was gathered of those that are tapped already is kept, and so is what is recorded when.

        Args:
            sites: the sites, in the model's order.
            buckets: the same sites, stacked.
            untapped: names of sites that get no hook.
        """
        remove(self.hooks)
        accounts = self.gathered.by_site()
        left = {id(site): known for site, known in zip(self.sites, self._gradients.left, strict=True)}
        self.sites = list(sites)
        self.gathered = Gathered(sites, buckets, self.kinds.present if self.kinds is not None else ())
        self._weights = [(site.a, site.b) for site in self.sites]
        self._gradients = KeptGradients(self._weights)
        self._positions = {id(site): position for position, site in enumerate(self.sites)}
        self._hooked.clear()
        self._passes = {}
        self.bypass.stepped()
        try:
            for position, site in enumerate(self.sites):
                if site.name in untapped:
                    continue
                remove_inert_taps(site.tap)
                self.hooks.append(site.tap.register_forward_hook(Tap(self, position)))
                self._hook_trained(position)
        except BaseException:
            remove(self.hooks)
            raise
        self.gathered.adopt(accounts)
        self._gradients.left = [left.get(id(site), {}) for site in self.sites]

    def _hook_trained(self, position: int) -> None:
        """Watch the gradients of A and B, as far as they are trained.

        In a forward pass FSDP2 has put gathered copies in their places, which get the gradients first.
        """
        site, held = self.sites[position], self._weights[position]
        used = (held_by(site.a_modules[site.adapter]), held_by(site.b_modules[site.adapter]))
        others = [weight for copy, weight in zip(used, held, strict=True) if copy is not weight]
        copies = used if others and (any(map(shards.is_shared, others)) or self._sharded()) else ()
        for side, weight in (*enumerate(held), *enumerate(copies)):
            if weight.requires_grad and (id(weight), side) not in self._hooked:
                self._hooked.add((id(weight), side))
                before, after = (GradientTap(self, position, side, before) for before in (True, False))
                self.hooks.append(weight.register_hook(before))
                self.hooks.append(weight.register_post_accumulate_grad_hook(after))

    def discard(self) -> None:
        """Forget what was gathered since the last :meth:`collect`."""
        self.bypass.stepped()
        self.gathered.clear()
        self._gradients.forget_all()
        self._passes = {}

    # ---------------------------------------------------------------- in a forward and backward pass

    def follow(self, position: int) -> None:
        """Take note of copies that FSDP2 has gathered for use, in evaluation too."""
        site = self.sites[position]
        for shard, entry in zip(self._weights[position], (site.a_modules, site.b_modules), strict=True):
            if shards.is_shared(shard) and (copy := held_by(entry[site.adapter])) is not shard:
                shards.note_gathered(copy, shard)

    def watch(self, position: int, output: Tensor) -> None:
        """Take note of h, and ask for its gradient. A functional transform's gradients reach no ``.grad``."""
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            return
        self._hook_trained(position)
        self._note_forward()
        site = self.sites[position]
        if self.bypass.watches(position):
            fired = self.gathered.fired[position]
            self.bypass.forward(position, site.name, self._weights[position], fired)
        kinds = self.kinds.of(site, output) if self.kinds is not None else 0
        output.register_hook(partial(self._receive, site, output.detach() if self.active else None, kinds))

    def _receive(self, site: Site, h: Tensor | None, kinds: Tensor | int, delta: Tensor) -> None:
        """Take note of one backward pass through one call of a site's ``lora_A``."""
        position = self._positions.get(id(site))
        if position is None:
            return
        with self._lock:
            under_way = self._pass()
            if (position, 0) in under_way.reached or (position, 1) in under_way.reached:
                self._record(position, h, kinds, delta)
            else:
                under_way.waiting.setdefault(position, []).append((h, kinds, delta))

    def before_gradient(self, position: int, side: int) -> None:
        """A backward pass is about to give A or B its gradient."""
        with self._lock:
            looked = self._pass().looked
            if position not in looked:
                if self.gathered.fired[position]:
                    self._drop_cleared(position)
                looked.add(position)

    def after_gradient(self, position: int, side: int) -> None:
        """A backward pass has accumulated into the gradient of A or B."""
        with self._lock:
            under_way = self._pass()
            under_way.reached.add((position, side))
            self._gradients.note(position, side)
            for h, kinds, delta in under_way.waiting.pop(position, ()):
                self._record(position, h, kinds, delta)

    def _pass(self) -> _Pass:
        """The backward pass under way in this thread."""
        task = torch._C._current_graph_task_id()
        if task not in self._passes:
            while len(self._passes) >= MOST_PASSES:
                del self._passes[next(iter(self._passes))]
            self._passes[task] = _Pass()
            at_the_end(partial(at_the_end, partial(self._end, task)))  # after what others do there
        return self._passes[task]

    def _end(self, task: int) -> None:
        """A backward pass is over. What has not reached a gradient is forgotten."""
        with self._lock:
            done = self._passes.pop(task, None)
            for position, side in done.reached if done is not None else ():
                self._gradients.note(position, side)

    def _record(self, position: int, h: Tensor | None, kinds: Tensor | int, delta: Tensor) -> None:
        """Let one backward pass through a site count."""
        with self._times("capture"):
            self.gathered.fired[position] += 1
            if h is not None:
                stride = self._stride(delta.numel() // self.gathered.rank(position))
                self.gathered.add(position, h, delta.detach(), Share(stride, self.offset % stride), kinds)

    def _stride(self, rows: int) -> int:
        """The stride with which a call of ``rows`` tokens keeps its share of ``max_tokens``."""
        if self.max_tokens is None:
            return 1
        per_call = max(1, self.max_tokens // self.calls_per_step)
        return max(1, -(-rows // per_call))

    # ---------------------------------------------------------------- gradients that were cleared

    def _drop_cleared(self, position: int) -> None:
        """Forget a site whose gradients were cleared; then all such, since they usually are together."""
        if not any(self._gradients.look([position], stepping=False)):
            return
        fired = [i for i, count in enumerate(self.gathered.fired) if count]
        cleared, doubtful = self._gradients.look(fired, stepping=False)
        lives = nonzero(doubtful)
        cleared += [i for i in doubtful if not lives[i]]
        self._gradients.accept(doubtful)
        self._drop(cleared)

    def _drop(self, positions: Sequence[int]) -> None:
        self.gathered.drop(positions)
        self._gradients.forget(positions)

    def settle(self) -> dict[int, Tensor]:
        """Forget the sites whose gradients were cleared, before the base steps.

        Returns:
            By position, whether the site counts: of those for which only the device knows.
        """
        fired = [position for position, count in enumerate(self.gathered.fired) if count]
        cleared, doubtful = self._gradients.look(fired, stepping=True)
        lives = nonzero(doubtful)
        seen = {i: flag for i, flag in lives.items() if flag.device.type in ("cpu", "meta")}
        cleared += [i for i, flag in seen.items() if flag.device.type == "cpu" and not flag]
        self._drop(cleared)
        return {i: flag for i, flag in lives.items() if i not in seen}

    # ---------------------------------------------------------------- in a step

    def collect(self, alive: Mapping[int, Tensor]) -> list[Sums]:
        """The sums since the last call, one entry per bucket. Gathering starts anew.

        Args:
            alive: what :meth:`settle` returned.
        """
        sums, fired = self.gathered.take(alive), self.gathered.fired
        if any(fired):
            self.calls_per_step = max(fired)
            self.offset += 1
        self.discard()
        return sums

    def seen(self) -> list[tuple[int, Tensor | None]]:
        """For each site, how often its tap fired since the last :meth:`collect`, and Σ h·δ."""
        return [(fired, self.gathered.inner(position)) for position, fired in enumerate(self.gathered.fired)]

    def record_next(self, active: bool) -> None:
        """Say whether tokens are recorded from now on."""
        self.active = active

    def state_dict(self) -> dict[str, int]:
        """What decides which tokens are taken next."""
        return {"calls_per_step": self.calls_per_step, "offset": self.offset}

    @staticmethod
    def saved_fields() -> Fields:
        """What a checkpoint may hold under the names of :meth:`state_dict`."""
        return {"calls_per_step": whole(1), "offset": whole()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, or start anew from an empty one."""
        self.calls_per_step, self.offset = state.get("calls_per_step", 1), state.get("offset", 0)

    def close(self) -> None:
        """Remove the taps."""
        remove(self.hooks)
        self._positions.clear()
        self.discard()
