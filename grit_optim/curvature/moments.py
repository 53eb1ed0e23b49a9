"""Second moments of the gradients: the Fisher approximations that are not made of token factors.

Each is a mean over steps of second moments of one step's gradient ∇A ``[r, d_in]`` or ∇B ``[d_out, r]``. A
step of one token gives the per-token Fisher information exactly. A step of N tokens gives N times as much, if
the tokens' gradients are independent.

    block_diagonal   E[∇A ∇Aᵀ], E[∇Bᵀ ∇B]     r×r per matrix; the Fisher's other side is taken for isotropic
    diagonal         E[∇A²], E[∇B²]            entry by entry
    ekfac            E[(Qᵀ ∇A)²], E[(∇B Q)²]   entry by entry, in the eigenbases Q of the token factors
                                               (George et al. 2018)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grit_optim.integrity.fields import Fields, factor, tensor
from grit_optim.lora.buckets import SIDES, Bucket, Group, Side
from grit_optim.lora.site import Site


def covariance(gradients: Tensor, side: Side) -> Tensor:
    """``G Gᵀ`` for A, ``Gᵀ G`` for B: ``[m, rows, columns] -> [m, r, r]``."""
    return gradients @ gradients.mT if side == "A" else gradients.mT @ gradients


def mean_square(groups: Sequence[Group], device: torch.device, relative: bool) -> Tensor:
    """The unit of the moments in one step, a scalar on ``device``; not finite if a gradient is not.

    All gradients of a step share the batch's factor 1/N and the loss scale. Moments of gradients divided by
    their root mean square depend on neither.

    Args:
        groups: the matrices, all with gradients.
        device: where the result is wanted.
        relative: whether the unit is the mean square over all entries of all gradients. If not, or if that is
            zero, the unit is 1.
    """
    stacks = [group.stack(group.gradients()) for group in groups]
    entries = max(1, sum(g.numel() for g in stacks))
    sums = [g.square().sum().to(device) for g in stacks]
    mean = torch.stack(sums).sum() / entries if sums else torch.zeros((), dtype=torch.float32, device=device)
    plain = (mean == 0) if relative else mean.isfinite()
    return torch.where(plain, 1.0, mean)


class GradientMoments:
    """Second moments of the gradients of a bucket's matrices.

    Attributes:
        kind: ``"block_diagonal"``, ``"diagonal"`` or ``"ekfac"``.
        bucket: the sites, in the order of every ``[S, …]`` tensor.
        weight: per side, the total weight in the means ``[S]``.
        means: per side, one fp32 tensor per site: ``[r, r]`` for block_diagonal, else the matrix's own shape,
            ``[r, d_in]`` or ``[d_out, r]``.
        scales: per side, what each entry of a matrix is multiplied by, tensors like ``means``. block_diagonal
            does not use them.
    """

    def __init__(self, kind: str, bucket: Bucket) -> None:
        self.kind = kind
        self.bucket = bucket
        size = len(bucket.sites)
        one = torch.ones((), dtype=torch.float32, device=bucket.device)
        self.weight = {side: one.new_zeros(size) for side in SIDES}
        shapes = {side: [_shape(kind, site, side) for site in bucket.sites] for side in SIDES}
        self.means = {side: [one.new_zeros(s) for s in shapes[side]] for side in SIDES}
        self.scales = {side: [one.new_ones(s) for s in shapes[side]] for side in SIDES}

    @property
    def elementwise(self) -> bool:
        """Whether there is one moment per entry, rather than an r×r matrix per gradient."""
        return self.kind != "block_diagonal"

    def stacked(self, of: Mapping[Side, Sequence[Tensor]], group: Group) -> Tensor:
        """The tensors of ``means`` or ``scales`` that belong to the matrices of ``group``, ``[m, …]``."""
        return torch.stack([of[group.side][i] for i in group.positions])

    def set(self, of: dict[Side, list[Tensor]], group: Group, stacked: Tensor) -> None:
        """Put the stacked tensors of ``group``, ``[m, …]``, back into ``means`` or ``scales``."""
        for position, matrix in zip(group.positions, stacked, strict=True):
            of[group.side][position] = matrix

    def fold(self, group: Group, gradients: Tensor, seen: Tensor, decay: float | None) -> None:
        """Fold one step's gradients into the means.

        Args:
            group: the matrices.
            gradients: their gradients ``[m, rows, columns]``, for ekfac in the eigenbasis.
            seen: sites of the bucket for which this step counts, boolean ``[S]``.
            decay: weight that the past keeps per step; None for the running mean over all steps.
        """
        index, weight = group.index, self.weight[group.side]
        update = gradients.square() if self.elementwise else covariance(gradients, group.side)
        counts, old = seen[index], weight[index] * (1.0 if decay is None else decay)
        mean = self.stacked(self.means, group)
        mixed = ((old[:, None, None] * mean + update) / (old + 1)[:, None, None]).to(mean.dtype)
        self.set(self.means, group, torch.where(counts[:, None, None], mixed, mean))
        self.weight[group.side] = weight.index_copy(0, index, torch.where(counts, old + 1, weight[index]))

    def matrices(self, side: Side) -> Tensor:
        """The covariances of block_diagonal for one side, ``[S, r, r]``."""
        return torch.stack(self.means[side])

    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        """Names of a site's saved tensors to the axes that run over its rank; the others have none."""
        axes: dict[str, tuple[int, ...]] = {"A": (0,), "B": (1,)}
        if not self.elementwise:
            axes = dict.fromkeys(SIDES, (0, 1))
        return {f"{self.kind}_{name}_{side}": axes[side] for side in SIDES for name in ("mean", "scale")}

    @staticmethod
    def saved_fields(kind: str, site: Site) -> Fields:
        """What a checkpoint may hold of ``site``, under the names of :meth:`pack`."""
        found = {}
        for side in SIDES:
            shape = _shape(kind, site, side)
            mean = factor(site.rank) if kind == "block_diagonal" else tensor(*shape, low=0)
            found[f"{kind}_weight_{side}"] = tensor(low=0)
            found[f"{kind}_mean_{side}"] = mean
            found[f"{kind}_scale_{side}"] = tensor(*shape, low=0)
        return found

    def pack(self, position: int, with_scales: bool) -> dict[str, Tensor]:
        """One site's state for a checkpoint, under keys that name the kind.

        Args:
            position: the site's place in the bucket.
            with_scales: whether scales are included.
        """
        state = {}
        for side in SIDES:
            state[f"{self.kind}_weight_{side}"] = self.weight[side][position].clone()
            state[f"{self.kind}_mean_{side}"] = self.means[side][position].clone()
            if with_scales and self.elementwise:
                state[f"{self.kind}_scale_{side}"] = self.scales[side][position].clone()
        return state

    def unpack(self, position: int, state: Mapping[str, Tensor]) -> None:
        """Put one site's state back. Moments of another kind are ignored; ours then start from nothing."""
        for side in SIDES:
            if (weight := state.get(f"{self.kind}_weight_{side}")) is not None:
                self.weight[side][position].copy_(weight)
            for name, tensors in (("mean", self.means), ("scale", self.scales)):
                if (saved := state.get(f"{self.kind}_{name}_{side}")) is not None:
                    tensors[side][position] = saved.to(tensors[side][position], copy=True)


def _shape(kind: str, site: Site, side: Side) -> tuple[int, ...]:
    """The shape of one matrix's moments."""
    if kind == "block_diagonal":
        return site.rank, site.rank
    return (site.rank, site.a.shape[1:].numel()) if side == "A" else (site.b.shape[0], site.rank)
