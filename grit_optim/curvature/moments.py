"""Second moments of the gradients themselves: the Fisher approximations that are not made of token factors.

Each is a mean over steps of what one step's gradient ∇A ``[r, d_in]`` or ∇B ``[d_out, r]`` gives; a step of
one token gives the per-token Fisher information exactly, a step of N tokens N times it where their gradients
are independent.

    block_diagonal   E[∇A ∇Aᵀ], E[∇Bᵀ ∇B]     r×r per matrix: the Fisher's rank side, the other side taken as isotropic
    diagonal         E[∇A²], E[∇B²]            entry by entry
    ekfac            E[(Qᵀ ∇A)²], E[(∇B Q)²]   entry by entry in the eigenbases Q of the token factors (George et al. 2018)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grit_optim.lora.buckets import SIDES, Bucket, Group, Side


def covariance(gradients: Tensor, side: Side) -> Tensor:
    """``G Gᵀ`` for A, ``Gᵀ G`` for B: ``[m, rows, columns] -> [m, r, r]``."""
    return gradients @ gradients.mT if side == "A" else gradients.mT @ gradients


def mean_square(groups: Sequence[Group], device: torch.device, relative: bool) -> Tensor:
    """The unit of the moments in one step, a scalar on ``device``, not finite if a gradient is not.

    All gradients of a step share the batch's 1/N and the loss scale. Divided by the mean square of all their
    entries the moments know neither; that is the unit if ``relative`` and it is not zero, else 1.
    """
    stacks = [group.stack(group.gradients()) for group in groups]
    entries = max(1, sum(g.numel() for g in stacks))
    sums = [g.square().sum().to(device) for g in stacks]
    mean = torch.stack(sums).sum() / entries if sums else torch.zeros((), device=device)
    plain = (mean == 0) if relative else mean.isfinite()
    return torch.where(plain, 1.0, mean)


class GradientMoments:
    """Second moments of the gradients of a bucket's matrices.

    Attributes:
        kind: ``"block_diagonal"``, ``"diagonal"`` or ``"ekfac"``.
        weight: total weight in the means ``[S]`` per side.
        means: per side a tensor per site: ``[r, r]`` for block_diagonal, the matrix's own shape ``[r, d_in]``
            or ``[d_out, r]`` for the others.
        scales: per side what each entry of a matrix is multiplied by, tensors like ``means``; of use for the
            last two.
    """

    def __init__(self, kind: str, bucket: Bucket) -> None:
        self.kind = kind
        self.bucket = bucket
        size, rank, device = len(bucket.sites), bucket.rank, bucket.device
        self.weight = {side: torch.zeros(size, device=device) for side in SIDES}
        shapes = {
            "A": [
                (rank, rank) if kind == "block_diagonal" else site.a.flatten(1).shape for site in bucket.sites
            ],
            "B": [
                (rank, rank) if kind == "block_diagonal" else site.b.flatten(1).shape for site in bucket.sites
            ],
        }
        self.means = {side: [torch.zeros(s, device=device) for s in shapes[side]] for side in SIDES}
        self.scales = {side: [torch.ones(s, device=device) for s in shapes[side]] for side in SIDES}

    @property
    def elementwise(self) -> bool:
        """Whether the moments are of single entries rather than r×r matrices."""
        return self.kind != "block_diagonal"

    def stacked(self, of: Mapping[Side, Sequence[Tensor]], group: Group) -> Tensor:
        """The entries of ``means`` or ``scales`` for the matrices of ``group``, ``[m, …]``."""
        return torch.stack([of[group.side][i] for i in group.positions])

    def set(self, of: dict[Side, list[Tensor]], group: Group, stacked: Tensor) -> None:
        """Put ``[m, …]`` back in its places."""
        for position, tensor in zip(group.positions, stacked, strict=True):
            of[group.side][position] = tensor

    def fold(self, group: Group, gradients: Tensor, seen: Tensor, decay: float | None) -> None:
        """Take one step's gradients into the means.

        Args:
            group: the matrices.
            gradients: their gradients, for ekfac in the eigenbasis ``[m, rows, columns]``.
            seen: which sites of the bucket this step counts for, a boolean tensor ``[S]``.
            decay: weight that the past keeps per step, or None for the mean over all steps.
        """
        index, weight = group.index, self.weight[group.side]
        update = gradients.square() if self.elementwise else covariance(gradients, group.side)
        counts, old = seen[index], weight[index] * (1.0 if decay is None else decay)
        mean = self.stacked(self.means, group)
        mixed = (old[:, None, None] * mean + update) / (old + 1)[:, None, None]
        self.set(self.means, group, torch.where(counts[:, None, None], mixed, mean))
        self.weight[group.side] = weight.index_copy(0, index, torch.where(counts, old + 1, weight[index]))

    def matrices(self, side: Side) -> Tensor:
        """The covariances of block_diagonal, ``[S, r, r]``."""
        return torch.stack(self.means[side])

    def pack(self, position: int, with_scales: bool) -> dict[str, Tensor]:
        """One site's state for a checkpoint, under keys that name the kind."""
        state = {}
        for side in SIDES:
            state[f"{self.kind}_weight_{side}"] = self.weight[side][position].clone()
            state[f"{self.kind}_mean_{side}"] = self.means[side][position].clone()
            if with_scales and self.elementwise:
                state[f"{self.kind}_scale_{side}"] = self.scales[side][position].clone()
        return state

    def unpack(self, position: int, state: Mapping[str, Tensor]) -> None:
        """Put one site's state back; moments of another kind are left alone, and start from nothing."""
        for side in SIDES:
            if (weight := state.get(f"{self.kind}_weight_{side}")) is not None:
                self.weight[side][position].copy_(weight)
            for name, tensors in (("mean", self.means), ("scale", self.scales)):
                if (saved := state.get(f"{self.kind}_{name}_{side}")) is not None:
                    tensors[side][position] = saved.to(self.bucket.device, copy=True)
