"""Penalties on a LoRA pair that come from its curvature, as gradients that need no term in the loss.

With Σ_a, Σ_g and the projectors P_a, P_g onto their leading eigenvectors held constant (GRIT, arXiv
2601.00231):

    curvature     λ_K (tr(Aᵀ Σ_a A) + tr(B Σ_g Bᵀ))         ∇_A = 2 λ_K Σ_a A          ∇_B = 2 λ_K B Σ_g
    reprojection  λ_R (‖(I − P_a) A‖² + ‖B (I − P_g)‖²)     ∇_A = 2 λ_R (I − P_a) A    ∇_B = 2 λ_R B (I − P_g)

Each gradient is one r×r matrix times A or B, so a pair's two penalties together cost one product per matrix
and step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.integrity.fields import Fields, tensor
from grit_optim.lora.buckets import Bucket, Group
from grit_optim.options import PenaltyOptions
from grit_optim.rank.selection import RankPolicy
from grit_optim.schedules import ramp


def operators(
    activation: Tensor,
    gradient: Tensor,
    onto_a: Tensor,
    onto_g: Tensor,
    lambda_kfac: float,
    lambda_reproj: float,
) -> tuple[Tensor, Tensor]:
    """``2 (λ_K Σ + λ_R (I − P))`` for A and for B, each ``[S, r, r]``.

    Args:
        activation: Σ_a ``[S, r, r]``.
        gradient: Σ_g ``[S, r, r]``.
        onto_a: P_a ``[S, r, r]``.
        onto_g: P_g ``[S, r, r]``.
        lambda_kfac: λ_K.
        lambda_reproj: λ_R.
    """
    eye = linalg.eye_like(activation)
    return (
        2 * (lambda_kfac * activation + lambda_reproj * (eye - onto_a)),
        2 * (lambda_kfac * gradient + lambda_reproj * (eye - onto_g)),
    )


class Penalties:
    """Both penalties on all pairs.

    Args:
        options: how strong they are.
        one_sided: P_g is P_a, as in that reprojection.
    """

    def __init__(self, options: PenaltyOptions, one_sided: bool) -> None:
        self._options = options
        self._one_sided = one_sided
        self._operators: dict[Bucket, tuple[Tensor, Tensor]] = {}  # of A and of B, [S, r, r] each

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Penalise nothing, of the pairs of these buckets, until the next refresh."""
        self._operators = {}
        for bucket in buckets if self._options.any else ():
            shape = len(bucket.sites), bucket.rank, bucket.rank
            zeros = torch.zeros(shape, dtype=torch.float32, device=bucket.device)
            self._operators[bucket] = zeros, zeros.clone()

    @property
    def active(self) -> bool:
        """Whether there is a penalty."""
        return self._options.any

    def share(self, step: int) -> float:
        """How much of their full strength the penalties have in ``step``, in [0, 1]; 0 without any."""
        return ramp(step, self._options.regularizer_warmup_steps) if self.active else 0.0

    def refresh(self, curvature: BucketCurvature, policy: RankPolicy) -> None:
        """Derive the operators from the factors as they are; a factor with too few samples penalises nothing.

        The rank k of both projectors is the one that ``policy`` gives Σ_a now, as in the paper's
        reprojection.
        """
        if not self.active:
            return
        options, factors = self._options, curvature.factors
        ready_a, ready_g = (ready[:, None, None] for ready in curvature.factors_ready())
        onto_a = onto_g = linalg.eye_like(factors.activation)
        if options.lambda_reproj:
            onto_a, onto_g = self._projectors(curvature, policy, ready_a, ready_g)
        self._operators[curvature.bucket] = operators(
            torch.where(ready_a, factors.activation, 0.0),
            torch.where(ready_g, factors.gradient, 0.0),
            onto_a,
            onto_g,
            options.lambda_kfac,
            options.lambda_reproj,
        )

    def _projectors(
        self, curvature: BucketCurvature, policy: RankPolicy, ready_a: Tensor, ready_g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """P_a and P_g: the identity until Σ_a has its samples, and P_g = P_a until Σ_g has.

        Exactly the identity on coordinates that were given up, so that those stay exactly zero.
        """
        factors, mask = curvature.factors, curvature.ranks.mask
        values, basis_a = linalg.leading_eigenbasis(factors.activation, mask)
        rank = policy.next_rank(values, curvature.ranks.rank, ready_a[:, 0, 0])
        keep = linalg.leading_mask(rank, values.shape[-1]) | ~mask
        onto_a = torch.where(ready_a, linalg.projector(basis_a, keep), linalg.eye_like(basis_a))
        if self._one_sided:
            return onto_a, onto_a
        basis_g = linalg.leading_eigenbasis(factors.gradient, mask)[1]
        return onto_a, torch.where(ready_a & ready_g, linalg.projector(basis_g, keep), onto_a)

    def gradient(self, bucket: Bucket, group: Group, share: float) -> Tensor:
        """The penalties' gradient for the matrices of ``group``, ``[m, rows, columns]``.

        Args:
            bucket: the group's bucket.
            group: the matrices.
            share: of the full strength, in [0, 1]: the warm-up.
        """
        of_a, of_b = self._operators[bucket]
        return share * group.apply(of_a if group.side == "A" else of_b, group.stack(group.parameters))

    @staticmethod
    def rank_axes() -> dict[str, tuple[int, ...]]:
        """Names of a pair's saved tensors to the axes that run over its rank."""
        return dict.fromkeys(_KEYS, (0, 1))

    @staticmethod
    def saved_fields(rank: int) -> Fields:
        """What a checkpoint may hold of a pair of this rank, under the names of :meth:`pack`."""
        return dict.fromkeys(_KEYS, tensor(rank, rank))

    def pack(self, bucket: Bucket, position: int) -> dict[str, Tensor]:
        """One pair's state for a checkpoint; empty without a penalty."""
        found = self._operators.get(bucket)
        return (
            {} if found is None else {key: t[position].clone() for key, t in zip(_KEYS, found, strict=True)}
        )

    def unpack(self, bucket: Bucket, position: int, state: Mapping[str, Tensor]) -> None:
        """Put one pair's state back."""
        for key, operator in zip(_KEYS, self._operators.get(bucket, ()), strict=False):
            if key in state:
                operator[position].copy_(state[key])


_KEYS = ("a_penalty", "b_penalty")
