"""h and δ of the tokens that the taps saw, waiting and added up, per bucket."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grit_optim.capture.sums import KindSums, Sums
from grit_optim.linalg import full_precision
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.site import Site
from grit_optim.options.declared import TOKEN_KINDS

PENDING_LIMIT = 2**22
"""Numbers in h and δ of one bucket that may wait to be added up.

The limit bounds memory under long accumulation, and still lets many sites share one batched product.
"""


class Share(NamedTuple):
    """Which tokens of a call are taken: one of every ``stride``, from the one at ``first`` on."""

    stride: int
    first: int


class _Seen(NamedTuple):
    """One backward pass through one call of a site's ``lora_A``.

    Attributes:
        slot: the site's place in its bucket.
        h: the output of ``lora_A``, in its own shape and dtype.
        delta: the gradient of ``h``.
        share: which of its tokens are taken.
        kinds: the kind of each of its tokens, ``[tokens]``, or that of all of them.
    """

    slot: int
    h: Tensor
    delta: Tensor
    share: Share
    kinds: Tensor | int


class Account(NamedTuple):
    """What was gathered of one site.

    Attributes:
        fired: how often its tap has seen a gradient.
        rank: its rank at that time.
        waiting: h, δ, the tokens that are taken and their kinds, of each pass that is not added up yet.
        added: the site's rows of :meth:`Sums.tensors`, and Σ h·δ, of those that are; empty if none is.
    """

    fired: int
    rank: int
    waiting: list[tuple[Tensor, Tensor, Share, Tensor | int]]
    added: list[Tensor]


class Gathered:
    """What counts of the backward passes since the last step.

    Args:
        sites: the sites, in the model's order.
        buckets: the same sites, stacked.
        kinds: the kinds of tokens that are kept apart.

    Attributes:
        fired: how often each site's tap has seen a gradient, in the order of ``sites``.
    """

    def __init__(self, sites: Sequence[Site], buckets: Sequence[Bucket], kinds: Sequence[int] = ()) -> None:
        self.sites = list(sites)
        self.buckets = list(buckets)
        self._kinds = tuple(kinds)
        where = {id(site): (b, s) for b, bucket in enumerate(buckets) for s, site in enumerate(bucket.sites)}
        self._slots = [where[id(site)] for site in self.sites]
        self._index_cache: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.fired = [0] * len(self.sites)
        self._dtypes = {torch.float32}
        self._stash: list[list[_Seen]] = [[] for _ in self.buckets]
        self._pending = [0] * len(self.buckets)
        # Σ h·δ of what is no longer in the stash, [S], and the sites for which there is any.
        self._inner = [torch.zeros(len(b.sites), dtype=torch.float32, device=b.device) for b in self.buckets]
        self._added: list[set[int]] = [set() for _ in self.buckets]
        most = len(TOKEN_KINDS) if self._kinds else 0
        self._sums = [Sums.zeros(len(b.sites), b.rank, b.device, most) for b in self.buckets]

    def rank(self, position: int) -> int:
        """The rank of the site at ``position``, as its bucket has it."""
        return self.buckets[self._slots[position][0]].rank

    @property
    def waiting(self) -> list[int]:
        """How many backward passes of a pair each bucket has yet to add up."""
        return [len(stash) for stash in self._stash]

    def add(self, position: int, h: Tensor, delta: Tensor, share: Share, kinds: Tensor | int = 0) -> None:
        """Take one backward pass. :meth:`_reduce` does the work later, for many sites at once.

        Args:
            position: the site's place in ``sites``.
            h: the output of ``lora_A``.
            delta: the gradient of ``h``.
            share: which of its tokens are taken.
            kinds: the kind of each of its tokens ``[tokens]``, or of all of them, as a place in
                :data:`TOKEN_KINDS`.
        """
        self._dtypes.update((h.dtype, delta.dtype))
        bucket, slot = self._slots[position]
        self._stash[bucket].append(_Seen(slot, h, delta, share, kinds))
        self._pending[bucket] += h.numel() + delta.numel()
        if self._pending[bucket] > PENDING_LIMIT:
            self._reduce(bucket, keep_inner=True)

    def drop(self, positions: Collection[int]) -> None:
        """Forget what is known of the sites at ``positions``, as if their taps had not fired."""
        slots: dict[int, set[int]] = {}
        for position in positions:
            self.fired[position] = 0
            bucket, slot = self._slots[position]
            slots.setdefault(bucket, set()).add(slot)
        for bucket, gone in slots.items():
            self._stash[bucket] = [seen for seen in self._stash[bucket] if seen.slot not in gone]
            self._pending[bucket] = sum(s.h.numel() + s.delta.numel() for s in self._stash[bucket])
            if added := gone & self._added[bucket]:
                index = self._index(bucket, tuple(sorted(added)))
                for tensor in (*self._sums[bucket].tensors(), self._inner[bucket]):
                    tensor.index_fill_(0, index, 0.0)
                self._added[bucket] -= added
        if not any(self.fired):
            self._dtypes = {torch.float32}

    def by_site(self) -> dict[int, Account]:
        """What was gathered of each site whose tap has fired, by the site's ``id``."""
        found = {}
        for position, (bucket, slot) in enumerate(self._slots):
            if not self.fired[position]:
                continue
            stash = self._stash[bucket]
            waiting = [(seen.h, seen.delta, seen.share, seen.kinds) for seen in stash if seen.slot == slot]
            added = []
            if slot in self._added[bucket]:
                added = [t[slot].clone() for t in (*self._sums[bucket].tensors(), self._inner[bucket])]
            found[id(self.sites[position])] = Account(
                self.fired[position], self.rank(position), waiting, added
            )
        return found

    def adopt(self, accounts: Mapping[int, Account]) -> None:
        """Go on with what was gathered of these sites, by their ``id``.

        A rank may have fallen. The directions that were cut off are those that were given up, along which h
        and δ are zero.
        """
        for position, site in enumerate(self.sites):
            account, rank = accounts.get(id(site)), self.rank(position)
            if account is None or account.rank < rank:
                continue
            self.fired[position] = account.fired
            for h, delta, share, kinds in account.waiting:
                dim = site.channel_dim
                self.add(position, h.narrow(dim, 0, rank), delta.narrow(dim, 0, rank), share, kinds)
            if account.added:
                bucket, slot = self._slots[position]
                mine = (*self._sums[bucket].tensors(), self._inner[bucket])
                for tensor, known in zip(mine, account.added, strict=True):
                    tensor[slot] += known[..., :rank, :rank] if known.dim() > 1 else known
                self._added[bucket].add(slot)

    def inner(self, position: int) -> Tensor | None:
        """Σ over tokens of h·δ of a site; None where nothing was recorded.

        It is computed only when asked for, from h and δ as far as they are still there.
        """
        bucket, slot = self._slots[position]
        waiting = [seen for seen in self._stash[bucket] if seen.slot == slot]
        if not waiting and slot not in self._added[bucket]:
            return None
        total = self._inner[bucket][slot]
        with full_precision():
            for seen in waiting:
                total = total + torch.dot(seen.h.reshape(-1).float(), seen.delta.reshape(-1).float()).to(
                    total.device
                )
        return total

    @property
    def rounding(self) -> float:
        """Machine epsilon of the coarsest dtype that h and δ came in (autocast)."""
        return max(torch.finfo(dtype).eps for dtype in self._dtypes)

    def take(self, alive: Mapping[int, Tensor]) -> list[Sums]:
        """The sums, one entry per bucket.

        Args:
            alive: for some positions, whether the site counts at all, a boolean scalar on its device.
        """
        for bucket in range(len(self.buckets)):
            if self._stash[bucket]:
                self._reduce(bucket, keep_inner=False)
        by_bucket: dict[int, dict[int, Tensor]] = {}
        for position, lives in alive.items():
            bucket, slot = self._slots[position]
            by_bucket.setdefault(bucket, {})[slot] = lives
        for bucket, flags in by_bucket.items():
            sums = self._sums[bucket]
            keep = torch.ones_like(sums.rows, dtype=torch.bool)
            keep.index_copy_(0, self._index(bucket, tuple(flags)), torch.stack(list(flags.values())))
            for tensor in sums.tensors():
                tensor.copy_(torch.where(keep.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0.0))
        return self._sums

    def _reduce(self, bucket: int, keep_inner: bool) -> None:
        """Add what waits in a bucket to its sums: one batched product per shape of h and δ."""
        entries, self._stash[bucket], self._pending[bucket] = self._stash[bucket], [], 0
        by_shape: dict[tuple[Any, ...], list[_Seen]] = {}
        for seen in entries:
            kind = seen.kinds if isinstance(seen.kinds, int) else None
            alike = (kind, seen.h.shape, seen.h.dtype, seen.delta.dtype, seen.share)
            by_shape.setdefault(alike, []).append(seen)
        sums = self._sums[bucket]
        with full_precision():
            for (*_, share), members in by_shape.items():
                index = self._index(bucket, tuple(seen.slot for seen in members))
                h, delta = self._stacked(bucket, index, members, keep_inner)
                # Padding, and tokens after which nothing is predicted, have δ = 0 but h ≠ 0. They do not
                # affect the loss, so h is left out too.
                matters = torch.linalg.vecdot(delta, delta)[..., None] != 0
                h = torch.where(matters, h, 0.0)
                sums.activation.index_add_(0, index, h.mT @ h)
                sums.gradient.index_add_(0, index, delta.mT @ delta)
                rows = matters.sum((1, 2), dtype=torch.float32)
                sums.rows.index_add_(0, index, rows)
                sums.tokens.index_add_(0, index, rows, alpha=share.stride)
                if sums.kinds is not None:
                    self._add_by_kind(sums.kinds, index, members, h, delta)

    def _add_by_kind(
        self, sums: KindSums, index: Tensor, members: list[_Seen], h: Tensor, delta: Tensor
    ) -> None:
        """Add h and δ of the tokens that are taken, ``[len(members), tokens, r]``, to their kinds' sums."""
        share, first = members[0].share, members[0].kinds
        taken = slice(share.first, None, share.stride)
        if isinstance(first, int):
            of_token = torch.full((1, 1), first, dtype=torch.int8, device=h.device)
        else:
            known = [seen.kinds for seen in members]
            of_token = torch.stack(
                [kinds[taken].to(h.device) for kinds in known if isinstance(kinds, Tensor)]
            )
        for kind in self._kinds if not isinstance(first, int) else (first,):
            mine = (of_token == kind)[..., None]
            some_h, some_delta = torch.where(mine, h, 0.0), torch.where(mine, delta, 0.0)
            sums.activation[:, kind].index_add_(0, index, some_h.mT @ some_h)
            sums.gradient[:, kind].index_add_(0, index, some_delta.mT @ some_delta)
            matters = torch.linalg.vecdot(some_delta, some_delta) != 0
            sums.rows[:, kind].index_add_(0, index, matters.sum(1, dtype=torch.float32))

    def _stacked(
        self, bucket: int, index: Tensor, members: list[_Seen], keep_inner: bool
    ) -> tuple[Tensor, Tensor]:
        """The tokens of h and of δ that are taken, each ``[len(members), tokens, r]`` in fp32."""
        share = members[0].share
        taken = slice(share.first, None, share.stride)
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
        return tensor.reshape(-1, self.buckets[bucket].rank).to(self.buckets[bucket].device)

    def _index(self, bucket: int, slots: tuple[int, ...]) -> Tensor:
        """``slots`` as a tensor on the bucket's device, cached.

        The same few patterns recur in every step, and copying one to a GPU would wait for it.
        """
        key = (bucket, slots)
        if key not in self._index_cache:
            if len(self._index_cache) > 256:
                self._index_cache.clear()
            self._index_cache[key] = torch.tensor(
                slots, dtype=torch.int64, device=self.buckets[bucket].device
            )
        return self._index_cache[key]
