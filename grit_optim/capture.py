"""Taps on the outputs of ``lora_A``: from one hook per site, h in the forward pass and δ in the backward pass.

The forward value of ``lora_A``'s output is h = A x and the gradient that arrives there is δ = ∂L/∂h, so one tap gives both
Fisher factors without any product of width d_in or d_out. A tensor hook fires exactly once for each backward pass through
a forward pass, whatever activation checkpointing recomputes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

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


class _Seen(NamedTuple):
    """One backward pass through one call of a site's ``lora_A``.

    Attributes:
        position: the site.
        h: as it came; or, if ``copied``, the rows taken of it ``[rows, r]``.
        delta: likewise.
        stride: out of how many rows one is taken.
        copied: whether ``h`` and ``delta`` are the rows taken.
    """

    position: int
    h: Tensor
    delta: Tensor
    stride: int
    copied: bool


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
        self._dtypes = {torch.float32}
        self._inner: list[Tensor | None] = [None] * len(self.sites)  # of what is no longer in the stash as it came
        self._stash: list[list[_Seen]] = [[] for _ in self.buckets]
        self._sums = [Sums.zeros(len(b.sites), b.rank, b.device) for b in self.buckets]

    def watch(self, position: int, output: Tensor) -> None:
        """Take note of h and ask for its gradient."""
        if self.bypass.watches(position):
            self.bypass.forward(position, self.sites[position], self.fired[position], partial(self.inner, position))
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
        """Take note of one backward pass, and leave the work to :meth:`_reduce`, which does it for all sites at once."""
        self.fired[position] += 1
        self._dtypes.update((h.dtype, delta.dtype))
        bucket, _ = self._slots[position]
        stride = self._stride(delta.numel() // self.buckets[bucket].rank)
        seen = _Seen(position, h, delta, stride, copied=False)
        if stride >= COPIED_STRIDE:
            self._add_inner(seen)
            h, delta = self._rows(seen)
            seen = _Seen(position, h.clone(), delta.clone(), stride, copied=True)
        self._stash[bucket].append(seen)
        if len(self._stash[bucket]) >= STASH_LIMIT * len(self.buckets[bucket].sites):
            for waiting in self._stash[bucket]:
                self._add_inner(waiting)
            self._reduce(bucket)

    def _rows(self, seen: _Seen) -> tuple[Tensor, Tensor]:
        """The rows of h and δ that are taken, ``[rows, r]`` each."""
        if seen.copied:
            return seen.h, seen.delta
        site, tensors = self.sites[seen.position], (seen.h, seen.delta)
        if site.channel_dim != -1:
            tensors = (seen.h.movedim(site.channel_dim, -1), seen.delta.movedim(site.channel_dim, -1))
        h, delta = (t.reshape(-1, site.rank) for t in tensors)
        if seen.stride > 1:
            h, delta = (t[self.offset % seen.stride :: seen.stride] for t in (h, delta))
        return h, delta

    def _add_inner(self, seen: _Seen) -> None:
        """Keep Σ h·δ of what will not be there any more in whole."""
        if seen.copied:
            return
        known, inner = self._inner[seen.position], _inner(seen)
        self._inner[seen.position] = inner if known is None else known + inner.to(known.device)

    def inner(self, position: int) -> Tensor | None:
        """Σ over tokens of h·δ of a site since the last :meth:`collect`, or None where nothing was recorded.

        Worked out when asked for as far as h and δ are still there, which they are until the step unless there are many rows.
        """
        total = self._inner[position]
        for seen in self._stash[self._slots[position][0]]:
            if seen.position == position and not seen.copied:
                total = _inner(seen) if total is None else total + _inner(seen).to(total.device)
        return total

    @property
    def rounding(self) -> float:
        """The machine epsilon of the coarsest dtype that h or δ came in since the last :meth:`collect` (autocast)."""
        return max(torch.finfo(dtype).eps for dtype in self._dtypes)

    def _stride(self, rows: int) -> int:
        """Every how many rows to take one, so that a step's calls together stay within ``max_tokens`` per site."""
        if self.max_tokens is None:
            return 1
        per_call = max(1, self.max_tokens // self.calls_per_step)
        return max(1, -(-rows // per_call))

    def _reduce(self, bucket: int) -> None:
        """Add the stashed rows of a bucket to its sums, one batched product for all sites with equally many rows."""
        entries, self._stash[bucket] = self._stash[bucket], []
        by_shape: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor]]] = {}
        for seen in entries:
            h, delta = self._rows(seen)
            members = by_shape.setdefault((h.shape, h.dtype, delta.dtype, seen.stride), [])
            members.append((self._slots[seen.position][1], h, delta))
        sums, device = self._sums[bucket], self.buckets[bucket].device
        for (*_, stride), members in by_shape.items():
            index = self._index(bucket, tuple(slot for slot, *_ in members))
            h = torch.stack([h.to(device) for _, h, _ in members]).float()
            delta = torch.stack([delta.to(device) for *_, delta in members]).float()
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


def _inner(seen: _Seen) -> Tensor:
    """Σ h·δ over one backward pass that is there as it came."""
    return torch.dot(seen.h.reshape(-1).float(), seen.delta.reshape(-1).float())


def _remove_inert_taps(module: nn.Module) -> None:
    """Take off taps that a copy of the model carried along."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Tap) and (hook._capture is None or hook._capture() is None):
            del module._forward_hooks[key]
