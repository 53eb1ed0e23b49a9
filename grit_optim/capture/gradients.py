"""What the gradients of a pair tell of its curvature, for sites whose tokens no tap sees.

A step's gradients are sums over its tokens: ∇A = Σ δ xᵀ and ∇B = s Σ g hᵀ. So the columns of ∇A are
mixtures of the δ, the rows of ∇B mixtures of the h, and ``∇A ∇Aᵀ`` and ``∇Bᵀ ∇B`` stand for Σ_g and Σ_a, up
to a factor for each. These are the covariances that Shampoo (Gupta et al. 2018) keeps of the rank's side. The
factors follow from ``A ∇Aᵀ = (Bᵀ ∇B)ᵀ = Σ h δᵀ``, the gradient of the loss with respect to what lies between
A and B. If tokens are independent, its squared norm is on average ``tr Σ_a · tr Σ_g`` times their number.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from grit_optim.capture.sums import Sums
from grit_optim.linalg import full_precision, mean_eigenvalue
from grit_optim.lora.buckets import Bucket, Group, in_pieces


@full_precision()
def add_gradients(sums: Sums, bucket: Bucket, names: Collection[str]) -> None:
    """Add to a step's sums what the gradients of some sites tell, in place of tokens.

    Σ_a has mean eigenvalue 1, and ``tr Σ_a · tr Σ_g`` is ``‖A ∇Aᵀ‖²``. A gradient counts for as many samples
    as the narrower of the two matrices is wide. Sites without a gradient, or whose ∇A is zero, as it is while
    B is, are in neither sum, as tokens with δ = 0 are not.

    Args:
        sums: of the bucket, with nothing of these sites.
        bucket: the sites.
        names: of the sites that are meant; others are left as they are.
    """
    slots = {place for place, site in enumerate(bucket.sites) if site.name in names}
    of_a, of_b, between = (torch.zeros_like(sums.gradient) for _ in range(3))
    chosen = [part for group in bucket.groups if (part := _chosen(group, slots)) is not None]
    for part in in_pieces(chosen):
        gradients = part.stack(part.gradients())
        if part.side == "A":
            of_a.index_copy_(0, part.index, (gradients @ gradients.mT).float())
            weights = part.stack(part.parameters)
            between.index_copy_(0, part.index, (weights @ gradients.mT).float())
        else:
            of_b.index_copy_(0, part.index, (gradients.mT @ gradients).float())
    a_mean, b_mean = mean_eigenvalue(of_a), mean_eigenvalue(of_b)
    seen = (a_mean != 0) & (b_mean != 0)  # true for NaN, which so reaches the sums, and is noticed there
    # The mean eigenvalue of Σ_g, where that of Σ_a is 1. Divided first: squares of squares would overflow.
    size = (between / a_mean.sqrt()[:, None, None]).square().sum((1, 2)) / bucket.rank**2
    sums.activation += torch.where(seen, bucket.narrower / b_mean, 0.0)[:, None, None] * of_b
    sums.gradient += torch.where(seen, bucket.narrower * size, 0.0)[:, None, None] * of_a
    sums.rows += torch.where(seen, bucket.narrower, 0.0)
    sums.tokens += seen.float()


def _chosen(group: Group, slots: Collection[int]) -> Group | None:
    """The members of a group that have a gradient and belong to the sites at ``slots``."""
    first = group.positions[:: group.experts]  # all experts of a parameter are among the sites, or none is
    there = [
        i
        for i, (place, parameter) in enumerate(zip(first, group.parameters, strict=True))
        if place in slots and parameter.grad is not None
    ]
    return group.subset(there) if there else None
