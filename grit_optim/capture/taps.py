"""Taps on the outputs of ``lora_A``: one hook per site gives h in the forward and δ in the backward pass.

The output of ``lora_A`` is h = A x, and the gradient that arrives there is δ = ∂L/∂h. One tap gives both
K-FAC factors, without any product of width d_in or d_out. A tensor hook fires exactly once for each backward
pass through a forward pass, whatever activation checkpointing recomputes.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_optim.capture.bypass import BypassWatch
from grit_optim.capture.sums import Sums
from grit_optim.integrity.fields import Fields, whole
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.site import Site
from grit_optim.profiling import StageTimes

PENDING_LIMIT = 2**22
"""Numbers in h and δ of one bucket that may wait to be added up.

The limit bounds memory under long accumulation, and still lets many sites share one batched product.
"""


class _Seen(NamedTuple):
    """One backward pass through one call of a site's ``lora_A``.

    Attributes:
        slot: the site's place in its bucket.
        h: the output of ``lora_A``, in its own shape and dtype.
        delta: the gradient of ``h``.
        stride: of so many tokens one is taken.
    """

    slot: int
    h: Tensor
    delta: Tensor
    stride: int


class Tap:
    """Forward hook on ``lora_A``.

    It holds its owner weakly, so that no model keeps an optimizer alive. A copied or unpickled model carries
    taps that do nothing; its optimizer, if it has one, puts its own there.
    """

    def __init__(self, taps: Taps | None, position: int) -> None:
        self._taps = weakref.ref(taps) if taps is not None else None
        self.position = position

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Watch for the gradient of ``output``, if it will get one."""
        taps = self.owner()
        if taps is not None and isinstance(output, Tensor) and output.requires_grad:
            taps.watch(self.position, output)

    def owner(self) -> Taps | None:
        """The :class:`Taps` that this tap belongs to; None in a copy, and after they are gone."""
        return self._taps() if self._taps is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Tap, (None, self.position)


class Taps:
    """Gathers h and δ of the tokens that the taps see, and adds them up per bucket.

    Args:
        sites: the sites, in the model's order.
        buckets: the same sites, stacked.
        max_tokens: tokens per site and step that enter the sums, evenly spaced; None: all.
        times: where the seconds spent in hooks are counted.

    Attributes:
        active: whether tokens are recorded. Taps that fire are counted in any case.
        fired: how often each site's tap has seen a gradient since the last :meth:`collect`, in the order of
            ``sites``.
        calls_per_step: how often the busiest tap fired in the last step, among which ``max_tokens`` are
            shared out.
        offset: steps collected so far, which shifts the first token that is taken.
        bypass: notices steps around the optimizer.
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
        try:
            for position, site in enumerate(self.sites):
                _remove_inert_taps(site.tap)
                self._hooks.append(site.tap.register_forward_hook(Tap(self, position)))
        except BaseException:  # nobody will hold these taps to close them
            self.close()
            raise

    def discard(self) -> None:
        """Forget what was gathered since the last :meth:`collect`."""
        self.bypass.stepped()
        self.fired = [0] * len(self.sites)
        self._dtypes = {torch.float32}
        self._stash: list[list[_Seen]] = [[] for _ in self.buckets]
        self._pending = [0] * len(self.buckets)
        # Σ h·δ of what is no longer in the stash, [S], and the sites for which there is any.
        self._inner = [torch.zeros(len(b.sites), device=b.device) for b in self.buckets]
        self._added: list[set[int]] = [set() for _ in self.buckets]
        self._sums = [Sums.zeros(len(b.sites), b.rank, b.device) for b in self.buckets]

    def watch(self, position: int, output: Tensor) -> None:
        """Take note of h, and ask for its gradient."""
        if self.bypass.watches(position):
            self.bypass.forward(
                position, self.sites[position], self.fired[position], partial(self.inner, position)
            )
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
        """Take note of one backward pass. :meth:`_reduce` does the work later, for many sites at once."""
        self.fired[position] += 1
        self._dtypes.update((h.dtype, delta.dtype))
        bucket, slot = self._slots[position]
        stride = self._stride(delta.numel() // self.buckets[bucket].rank)
        self._stash[bucket].append(_Seen(slot, h, delta, stride))
        self._pending[bucket] += h.numel() + delta.numel()
        if self._pending[bucket] > PENDING_LIMIT:
            self._reduce(bucket, keep_inner=True)

    def inner(self, position: int) -> Tensor | None:
        """Σ over tokens of h·δ of a site since the last :meth:`collect`; None where nothing was recorded.

        It is computed only when asked for, from h and δ as far as they are still there.
        """
        bucket, slot = self._slots[position]
        waiting = [seen for seen in self._stash[bucket] if seen.slot == slot]
        if not waiting and slot not in self._added[bucket]:
            return None
        total = self._inner[bucket][slot]
        for seen in waiting:
            total = total + torch.dot(seen.h.reshape(-1).float(), seen.delta.reshape(-1).float()).to(
                total.device
            )
        return total

    def seen(self) -> list[tuple[int, Tensor | None]]:
        """For each site, how often its tap fired since the last :meth:`collect`, and its :meth:`inner`."""
        return [(fired, self.inner(position)) for position, fired in enumerate(self.fired)]

    @property
    def rounding(self) -> float:
        """Machine epsilon of the coarsest dtype of h and δ since the last :meth:`collect` (autocast)."""
        return max(torch.finfo(dtype).eps for dtype in self._dtypes)

    def _stride(self, rows: int) -> int:
        """The stride with which a call of ``rows`` tokens keeps its share of ``max_tokens``."""
        if self.max_tokens is None:
            return 1
        per_call = max(1, self.max_tokens // self.calls_per_step)
        return max(1, -(-rows // per_call))

    def _reduce(self, bucket: int, keep_inner: bool) -> None:
        """Add what waits in a bucket to its sums: one batched product per shape of h and δ."""
        entries, self._stash[bucket], self._pending[bucket] = self._stash[bucket], [], 0
        by_shape: dict[tuple[Any, ...], list[_Seen]] = {}
        for seen in entries:
            by_shape.setdefault((seen.h.shape, seen.h.dtype, seen.delta.dtype, seen.stride), []).append(seen)
        sums = self._sums[bucket]
        for (*_, stride), members in by_shape.items():
            index = self._index(bucket, tuple(seen.slot for seen in members))
            h, delta = self._stacked(bucket, index, members, keep_inner)
            # Padding, and tokens after which nothing is predicted, have δ = 0 but h ≠ 0. They do not affect
            # the loss, so h is left out too.
            matters = torch.linalg.vecdot(delta, delta)[..., None] != 0
            h = torch.where(matters, h, 0.0)
            sums.activation.index_add_(0, index, h.mT @ h)
            sums.gradient.index_add_(0, index, delta.mT @ delta)
            rows = matters.sum((1, 2), dtype=torch.float32)
            sums.rows.index_add_(0, index, rows)
            sums.tokens.index_add_(0, index, rows, alpha=stride)

    def _stacked(
        self, bucket: int, index: Tensor, members: list[_Seen], keep_inner: bool
    ) -> tuple[Tensor, Tensor]:
        """The tokens of h and of δ that are taken, each ``[len(members), tokens, r]`` in fp32."""
        taken = slice(self.offset % members[0].stride, None, members[0].stride)
        h = [self._by_token(bucket, seen.slot, seen.h) for seen in members]
        delta = [self._by_token(bucket, seen.slot, seen.delta) for seen in members]
        # On the CPU only the tokens that are taken are copied. On a GPU one large copy costs less than many.
        if not keep_inner and self.buckets[bucket].device.type == "cpu":
            return torch.stack([t[taken] for t in h]).float(), torch.stack([t[taken] for t in delta]).float()
        all_h, all_delta = torch.stack(h), torch.stack(delta)
        if keep_inner:
            self._inner[bucket].index_add_(0, index, (all_h.float() * all_delta.float()).sum((1, 2)))
            self._added[bucket].update(seen.slot for seen in members)
        return all_h[:, taken].float(), all_delta[:, taken].float()

    def _by_token(self, bucket: int, slot: int, tensor: Tensor) -> Tensor:
        """One call's h or δ as ``[tokens, r]`` on the bucket's device."""
        site = self.buckets[bucket].sites[slot]
        if site.channel_dim != -1:
            tensor = tensor.movedim(site.channel_dim, -1)
        return tensor.reshape(-1, site.rank).to(self.buckets[bucket].device)

    def _index(self, bucket: int, slots: tuple[int, ...]) -> Tensor:
        """``slots`` as a tensor on the bucket's device, cached.

        The same few patterns recur in every step, and copying one to a GPU would wait for it.
        """
        key = (bucket, slots)
        if key not in self._index_cache:
            if len(self._index_cache) > 256:
                self._index_cache.clear()
            self._index_cache[key] = torch.tensor(slots, device=self.buckets[bucket].device)
        return self._index_cache[key]

    def collect(self) -> list[Sums]:
        """The sums since the last call, one entry per bucket. Gathering starts anew."""
        for bucket in range(len(self.buckets)):
            if self._stash[bucket]:
                self._reduce(bucket, keep_inner=False)
        sums = self._sums
        if any(self.fired):
            self.calls_per_step = max(self.fired)
            self.offset += 1
        self.discard()
        return sums

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
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.discard()


def _remove_inert_taps(module: nn.Module) -> None:
    """Take off taps that a copy of the model carried along."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Tap) and hook.owner() is None:
            del module._forward_hooks[key]
