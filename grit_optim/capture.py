"""Taps on the outputs of ``lora_A``: from one hook per site, h in the forward pass and δ in the backward pass.

The forward value of ``lora_A``'s output is h = A x and the gradient that arrives there is δ = ∂L/∂h, so one tap gives both
Fisher factors without any product of width d_in or d_out. A tensor hook fires exactly once for each backward pass through
a forward pass, whatever activation checkpointing recomputes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grit_optim.buckets import Bucket
from grit_optim.bypass import BypassWatch
from grit_optim.fisher import Sums
from grit_optim.sites import Site
from grit_optim.telemetry import StageTimes

STASH_LIMIT = 8
"""Backward passes per site whose rows are kept before they are added up; bounds memory under long accumulation."""

COPIED_STRIDE = 4
"""From one row in so many on, the rows are copied, so that the whole activation can be freed before the step."""

# A site's place in its bucket, its rows of h and δ, and out of how many each row was taken.
_Rows = tuple[int, Tensor, Tensor, int]


class Tap:
    """Forward hook on ``lora_A``. Holds its capture weakly, so that no model keeps an optimizer alive.

    A copied or unpickled model carries taps that do nothing: its optimizer, if it has one, puts its own there.
    """

    def __init__(self, capture: Capture | None, position: int) -> None:
        self._capture = weakref.ref(capture) if capture is not None else None
        self.position = position

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Watch for the gradient of ``output`` where there will be one."""
        capture = self._capture() if self._capture is not None else None
        if capture is not None and isinstance(output, Tensor) and output.requires_grad:
            capture.watch(self.position, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (None, self.position)


class Capture:
    """Gathers the rows of h and δ that the taps see, and adds them up per bucket.

    Attributes:
        active: whether rows are recorded; taps that fire are counted in any case.
        fired: how often each site's tap has seen a gradient since the last :meth:`collect`, in the order of ``sites``.
        inner: Σ over tokens of h·δ per site since the last :meth:`collect`, or None where nothing was recorded.
        rounding: the machine epsilon of the coarsest dtype that h or δ came in since then (autocast).
    """

    def __init__(
        self, sites: Sequence[Site], buckets: Sequence[Bucket], max_tokens: int | None, times: StageTimes
    ) -> None:
        self.sites = list(sites)
        self.buckets = list(buckets)
        self.max_tokens = max_tokens
        self._times = times
        self.active = True
        self.calls_per_step = 1
        self.offset = 0
        where = {id(site): (b, s) for b, bucket in enumerate(buckets) for s, site in enumerate(bucket.sites)}
        self._slots = [where[id(site)] for site in self.sites]
        self._index_cache: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.bypass = BypassWatch()
        self.discard()
        for position, site in enumerate(self.sites):
            _remove_inert_taps(site.tap)
            self._hooks.append(site.tap.register_forward_hook(Tap(self, position)))

    def discard(self) -> None:
        """Forget what was gathered since the last :meth:`collect`."""
        self.bypass.stepped()
        self.fired = [0] * len(self.sites)
        self.inner: list[Tensor | None] = [None] * len(self.sites)
        self.rounding = torch.finfo(torch.float32).eps
        self._stash: list[list[_Rows]] = [[] for _ in self.buckets]
        self._sums = [Sums.zeros(len(b.sites), b.rank, b.device) for b in self.buckets]

    def watch(self, position: int, output: Tensor) -> None:
        """Take note of h and ask for its gradient."""
        self.bypass.forward(position, self.sites[position], self.fired[position], self.inner[position])
        if not self.active:
            output.register_hook(partial(self._count, position))
            return
        output.register_hook(partial(self._receive, position, output.detach()))

    def _receive(self, position: int, h: Tensor, delta: Tensor) -> None:
        with self._times("capture"):
            self._record(position, h, delta.detach())

    def _count(self, position: int, delta: Tensor) -> None:
        self.fired[position] += 1

    def _record(self, position: int, h: Tensor, delta: Tensor) -> None:
        """Take the rows of one backward pass through one call of a site's ``lora_A``."""
        site = self.sites[position]
        self.fired[position] += 1
        self.rounding = max(self.rounding, torch.finfo(h.dtype).eps, torch.finfo(delta.dtype).eps)
        inner = torch.dot(h.reshape(-1).float(), delta.reshape(-1).float())
        known = self.inner[position]
        self.inner[position] = inner if known is None else known + inner.to(known.device)
        bucket, slot = self._slots[position]
        h, delta = (t.movedim(site.channel_dim, -1).reshape(-1, site.rank) for t in (h, delta))
        stride = self._stride(h.shape[0])
        if stride > 1:
            h, delta = (t[self.offset % stride :: stride] for t in (h, delta))
        if stride >= COPIED_STRIDE:
            h, delta = h.clone(), delta.clone()
        self._stash[bucket].append((slot, h, delta, stride))
        if len(self._stash[bucket]) >= STASH_LIMIT * len(self.buckets[bucket].sites):
            self._reduce(bucket)

    def _stride(self, rows: int) -> int:
        """Every how many rows to take one, so that a step's calls together stay within ``max_tokens`` per site."""
        if self.max_tokens is None:
            return 1
        per_call = max(1, self.max_tokens // self.calls_per_step)
        return max(1, -(-rows // per_call))

    def _reduce(self, bucket: int) -> None:
        """Add the stashed rows of a bucket to its sums, one batched product for all sites with equally many rows."""
        entries, self._stash[bucket] = self._stash[bucket], []
        by_shape: dict[tuple[Any, ...], list[_Rows]] = {}
        for entry in entries:
            by_shape.setdefault((entry[1].shape, entry[1].dtype, entry[2].dtype, entry[3]), []).append(entry)
        sums, device = self._sums[bucket], self.buckets[bucket].device
        for (*_, stride), members in by_shape.items():
            index = self._index(bucket, tuple(slot for slot, *_ in members))
            h = torch.stack([h.to(device) for _, h, _, _ in members]).float()
            delta = torch.stack([delta.to(device) for _, _, delta, _ in members]).float()
            # Padding, and tokens after which nothing is predicted, have δ = 0 but h ≠ 0: they say nothing of the loss.
            matters = torch.linalg.vecdot(delta, delta)[..., None] != 0
            h = torch.where(matters, h, 0.0)
            sums.activation.index_add_(0, index, h.mT @ h)
            sums.gradient.index_add_(0, index, delta.mT @ delta)
            rows = matters.sum((1, 2), dtype=torch.float32)
            sums.rows.index_add_(0, index, rows)
            sums.tokens.index_add_(0, index, rows, alpha=stride)

    def _index(self, bucket: int, slots: tuple[int, ...]) -> Tensor:
        """``slots`` as a tensor; the same few patterns recur in every step, and copying one to a GPU would wait for it."""
        key = (bucket, slots)
        if key not in self._index_cache:
            if len(self._index_cache) > 256:
                self._index_cache.clear()
            self._index_cache[key] = torch.tensor(slots, device=self.buckets[bucket].device)
        return self._index_cache[key]

    def collect(self) -> list[Sums]:
        """The sums over what was gathered since the last call, one entry per bucket; gathering starts anew."""
        for bucket in range(len(self.buckets)):
            if self._stash[bucket]:
                self._reduce(bucket)
        sums = self._sums
        if any(self.fired):
            self.calls_per_step = max(self.fired)
            self.offset += 1
        self.discard()
        return sums

    def close(self) -> None:
        """Remove the taps."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.discard()


def _remove_inert_taps(module: nn.Module) -> None:
    """Take off taps that a copy of the model carried along."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Tap) and (hook._capture is None or hook._capture() is None):
            del module._forward_hooks[key]
