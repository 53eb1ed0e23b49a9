"""The K-FAC factors of a bucket's sites, as running or decayed means over tokens.

``activation`` is Σ_a = E[h hᵀ] and ``gradient`` is Σ_g = E[δ δᵀ], each ``[S, r, r]`` in fp32. They are the
K-FAC factors of a LoRA pair restricted to its rank. The running means are those of Wu et al. 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.capture.sums import Sums
from grit_optim.integrity.fields import Fields, factor, tensor

RANK_AXES = {"activation": (0, 1), "gradient": (0, 1)}
"""Names of a site's saved tensors to the axes that run over its rank; the others have none."""


@dataclass(eq=False)
class Factors:
    """Σ_a and Σ_g of a bucket's sites, and how much has gone into them.

    Attributes:
        activation: Σ_a ``[S, r, r]``.
        gradient: Σ_g ``[S, r, r]``. With relative damping its unit is each step's mean of tr(Σ_g)/r over all
            sites, which takes batch size, token count and loss scale out of it.
        activation_weight: total weight in Σ_a ``[S]``.
        gradient_weight: total weight in Σ_g ``[S]``.
        activation_samples: tokens that have gone into Σ_a ``[S]``.
        gradient_samples: tokens that have gone into Σ_g ``[S]``.
        price: predicted rise of the loss per unit of ``tr(Σ_g Σ_a)`` of the coordinates dropped ``[S]``, in
            the loss's unit: ½·N·T, where the loss is a mean over N tokens and T tokens of a step reach the
            site (see :meth:`fold`). Of gradients it gives the order of sites and directions alone, since N is
            not known.
        by_gradients: 1 for sites whose factors come from gradients, else 0 ``[S]``.
    """

    activation: Tensor
    gradient: Tensor
    activation_weight: Tensor
    gradient_weight: Tensor
    activation_samples: Tensor
    gradient_samples: Tensor
    price: Tensor
    by_gradients: Tensor

    @classmethod
    def zeros(cls, sites: int, rank: int, device: torch.device) -> Factors:
        """Factors into which nothing has gone."""
        matrix = torch.zeros(sites, rank, rank, dtype=torch.float32, device=device)
        scalar = torch.zeros(sites, dtype=torch.float32, device=device)
        return cls(matrix, matrix.clone(), scalar, *(scalar.clone() for _ in range(5)))

    def forget(self, sites: Tensor) -> None:
        """Reset the sites chosen by the boolean ``[S]``, as if none of their tokens had been seen."""
        for known in fields(self):
            value = getattr(self, known.name)
            setattr(self, known.name, torch.where(by_site(sites, value), 0.0, value))

    def ready(self, min_samples: int) -> tuple[Tensor, Tensor]:
        """Whether each site's Σ_a and Σ_g have seen ``min_samples`` tokens: two boolean tensors ``[S]``."""
        floor = max(min_samples, 1)
        return self.activation_samples >= floor, self.gradient_samples >= floor

    def fold(
        self,
        sums: Sums,
        accept: Tensor,
        decay: float | None,
        gradient_unit: Tensor,
        loss_tokens: Tensor | None = None,
        by_gradients: Tensor | None = None,
    ) -> None:
        """Fold one step's sums into the means.

        ``price`` follows from the Gauss-Newton matrix. Let ``L = (1/N) Σ_n ℓ_n`` be the loss. A change Δh_t
        of the site's h at each of T tokens changes L by ``(1/2N) Σ_t Δh_tᵀ F_t Δh_t`` to second order, with
        F_t the Fisher matrix of ``Σ_n ℓ_n`` at token t. The gradient there is ``δ_t = (1/N) Σ_n ∂ℓ_n/∂h_t``,
        so ``F_t ≈ N² E[δ δᵀ]``. For ``Δh = −(I − P) h`` the sum is ``½·N·T·tr((I − P)ᵀ Σ_g (I − P) Σ_a)``.
        Correlations between tokens, and between sites, are neglected.

        Args:
            sums: the step's sums over tokens.
            accept: boolean scalar; where false nothing changes.
            decay: weight that the past keeps per step; None for the running mean over all tokens.
            gradient_unit: the unit in which this step's Σ_g is measured, a positive scalar.
            loss_tokens: N, the number of tokens that the step's loss is a mean over, a scalar; None: as many
                as reach the site.
            by_gradients: sites whose sums come from gradients, boolean ``[S]``; None: none.
        """
        if by_gradients is not None:
            self.by_gradients = by_gradients.float()
        seen = (sums.rows > 0) & accept
        count = sums.rows.clamp_min(1)
        kept, added = (1.0, sums.rows) if decay is None else (decay, torch.ones_like(sums.rows))
        price = 0.5 * (sums.tokens if loss_tokens is None else loss_tokens) * sums.tokens * gradient_unit
        weight = kept * self.gradient_weight
        mean_price = (weight * self.price + added * price) / (weight + added).clamp_min(
            torch.finfo(price.dtype).tiny
        )
        self.price = torch.where(seen, mean_price, self.price)
        for side, total in (("activation", sums.activation), ("gradient", sums.gradient / gradient_unit)):
            mean, weight, samples = (getattr(self, side + end) for end in ("", "_weight", "_samples"))
            old_weight = kept * weight
            new_weight = old_weight + added
            updated = (
                old_weight[:, None, None] * mean + (added / count)[:, None, None] * total
            ) / new_weight.clamp_min(torch.finfo(weight.dtype).tiny)[:, None, None]
            setattr(self, side, torch.where(seen[:, None, None], updated, mean))
            setattr(self, side + "_weight", torch.where(seen, new_weight, weight))
            setattr(self, side + "_samples", torch.where(seen, samples + sums.rows, samples))

    def change_coordinates(self, a_weight: Tensor, b_weight: Tensor) -> None:
        """Follow ``A ← M A`` and ``B ← B N``: ``Σ_a ← M Σ_a Mᵀ`` and ``Σ_g ← Nᵀ Σ_g N``.

        The reason is that h ← M h and δ ← Nᵀ δ.

        Args:
            a_weight: M ``[S, r, r]``.
            b_weight: N ``[S, r, r]``.
        """
        self.activation, self.gradient = moved(self.activation, self.gradient, a_weight, b_weight)

    @staticmethod
    def saved_fields(rank: int) -> Fields:
        """What a checkpoint may hold of a site of this rank, under the names of :meth:`pack`."""
        amounts = [known.name for known in fields(Factors) if known.name not in RANK_AXES]
        return {name: factor(rank) for name in RANK_AXES} | {name: tensor(low=0) for name in amounts}

    def pack(self, position: int) -> dict[str, Tensor]:
        """One site's state for a checkpoint."""
        return {known.name: getattr(self, known.name)[position].clone() for known in fields(self)}

    def unpack(self, position: int, state: Mapping[str, Tensor]) -> None:
        """Put one site's state back. Checkpoints from before costs were predicted have no price."""
        for known in fields(self):
            if known.name in state:
                getattr(self, known.name)[position].copy_(state[known.name])


def by_site(values: Tensor, like: Tensor) -> Tensor:
    """One value per site ``[S]``, to go with ``like`` ``[S, …]``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def moved(activation: Tensor, gradient: Tensor, a_weight: Tensor, b_weight: Tensor) -> tuple[Tensor, Tensor]:
    """``M Σ_a Mᵀ`` and ``Nᵀ Σ_g N``, symmetric and in fp32: the factors after ``A ← M A`` and ``B ← B N``."""
    activation = a_weight @ activation.to(a_weight.dtype) @ a_weight.mT
    gradient = b_weight.mT @ gradient.to(b_weight.dtype) @ b_weight
    return linalg.symmetric(activation).float(), linalg.symmetric(gradient).float()
