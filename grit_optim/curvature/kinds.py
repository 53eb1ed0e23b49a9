"""The K-FAC factors of each kind of token, and their combination.

A language model that sees pictures has many more tokens of these than of text, so that Σ_a and Σ_g describe
the pictures. Kept apart, they can be combined by other shares:

    Σ = Σ_k w_k Σ^k / Σ_k w_k        Σ^k = C^k / p^k

C^k is the part of Σ that tokens of kind k bring, p^k the share of tokens that are of it, both means over
steps with the weights of Σ itself. So Σ_k C^k is Σ as the tokens come, a step without pictures changes
nothing of theirs, and steps count by the tokens that they have of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grit_optim.capture.sums import KindSums, Sums
from grit_optim.curvature.factors import by_site, moved
from grit_optim.integrity.fields import Fields, factor, tensor
from grit_optim.options.declared import TOKEN_KINDS


class KindFactors:
    """What the tokens of each kind bring to the factors of a bucket's sites.

    Attributes:
        activation: C^k of Σ_a, ``[S, K, r, r]``, in the order of :data:`TOKEN_KINDS`.
        gradient: C^k of Σ_g, ``[S, K, r, r]``.
        share: p^k ``[S, K]``.
    """

    def __init__(
        self, sites: int, rank: int, device: torch.device, weights: str | Mapping[str, float]
    ) -> None:
        empty = KindSums.zeros(sites, len(TOKEN_KINDS), rank, device)
        self.activation, self.gradient, self.share = empty
        given = {} if isinstance(weights, str) else weights
        values = [float(given.get(kind, 0.0 if given else 1.0)) for kind in TOKEN_KINDS]
        self._weights = torch.tensor(values, dtype=torch.float32, device=device)

    def fold(
        self, sums: Sums, accept: Tensor, decay: float | None, gradient_unit: Tensor, weight: Tensor
    ) -> None:
        """Fold one step's sums into the means; see :meth:`Factors.fold`.

        Args:
            sums: the step's sums. Sites whose sums come from gradients, without kinds, count as one kind.
            accept: boolean scalar; where false nothing changes.
            decay: weight that the past keeps per step; None for the running mean over all tokens.
            gradient_unit: the unit in which this step's Σ_g is measured.
            weight: total weight in the factors before this step ``[S]``.
        """
        assert sums.kinds is not None
        of_kinds = _as_one_kind(sums, sums.kinds)
        seen = (sums.rows > 0) & accept
        kept, added = (1.0, sums.rows) if decay is None else (decay, torch.ones_like(sums.rows))
        old = kept * weight
        total = (old + added).clamp_min(torch.finfo(weight.dtype).tiny)
        step = added / sums.rows.clamp_min(1)

        def mean(known: Tensor, new: Tensor) -> Tensor:
            """The mean with this step's ``[S, K, …]`` in it, where the site has seen tokens."""
            mixed = by_site(old, known) * known + by_site(step, known) * new
            return torch.where(by_site(seen, known), mixed / by_site(total, known), known)

        self.activation = mean(self.activation, of_kinds.activation)
        self.gradient = mean(self.gradient, of_kinds.gradient / gradient_unit)
        self.share = mean(self.share, of_kinds.rows)

    def combined(self) -> tuple[Tensor, Tensor]:
        """Σ_a and Σ_g by the weights, ``[S, r, r]`` each; as they come where none that has one is seen."""
        present = self.share > torch.finfo(self.share.dtype).tiny
        weights = torch.where(present, self._weights, 0.0)
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, self.share)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        scale = torch.where(present, weights / self.share, 0.0)[..., None, None]
        return (scale * self.activation).sum(1), (scale * self.gradient).sum(1)

    def of_kind(self, kind: int) -> tuple[Tensor, Tensor]:
        """Σ_a and Σ_g of the tokens of one kind, ``[S, r, r]`` each; zero where none was seen."""
        share = self.share[:, kind, None, None].clamp_min(torch.finfo(self.share.dtype).tiny)
        return self.activation[:, kind] / share, self.gradient[:, kind] / share

    def change_coordinates(self, a_weight: Tensor, b_weight: Tensor) -> None:
        """Follow ``A ← M A`` and ``B ← B N``, as :meth:`Factors.change_coordinates`."""
        weights = a_weight[:, None], b_weight[:, None]
        self.activation, self.gradient = moved(self.activation, self.gradient, *weights)

    def forget(self, sites: Tensor) -> None:
        """Reset the sites chosen by the boolean ``[S]``."""
        for name in ("activation", "gradient", "share"):
            value = getattr(self, name)
            setattr(self, name, torch.where(by_site(sites, value), 0.0, value))

    @staticmethod
    def rank_axes() -> dict[str, tuple[int, ...]]:
        """Names of a site's saved tensors to the axes that run over its rank; the others have none."""
        return {f"{kind}_{name}": (0, 1) for kind in TOKEN_KINDS for name in ("activation", "gradient")}

    @staticmethod
    def saved_fields(rank: int) -> Fields:
        """What a checkpoint may hold of a site of this rank, under the names of :meth:`pack`."""
        shares = {f"{kind}_share": tensor(low=0, high=1.001) for kind in TOKEN_KINDS}
        return {name: factor(rank) for name in KindFactors.rank_axes()} | shares

    def pack(self, position: int) -> dict[str, Tensor]:
        """One site's state for a checkpoint."""
        return {
            f"{kind}_{name}": getattr(self, name)[position, k].clone()
            for k, kind in enumerate(TOKEN_KINDS)
            for name in ("activation", "gradient", "share")
        }

    def unpack(self, position: int, state: Mapping[str, Tensor]) -> None:
        """Put one site's state back. A checkpoint of a run that told no kinds apart has none."""
        for k, kind in enumerate(TOKEN_KINDS):
            for name in ("activation", "gradient", "share"):
                if (saved := state.get(f"{kind}_{name}")) is not None:
                    getattr(self, name)[position, k].copy_(saved)


def make_kinds(
    sites: int, rank: int, device: torch.device, weights: str | Mapping[str, float] | None
) -> KindFactors | None:
    """The factors by kind of token; None where the option ``modality_weights`` tells no kinds apart."""
    return None if weights is None else KindFactors(sites, rank, device, weights)


def _as_one_kind(sums: Sums, kinds: KindSums) -> KindSums:
    """The sums by kind, where sites that have none of them count as one kind."""
    without = (sums.rows > 0) & (kinds.rows.sum(1) == 0)
    whole = KindSums(*(torch.zeros_like(part) for part in kinds))
    for part, total in zip(whole, (sums.activation, sums.gradient, sums.rows), strict=True):
        part[:, 0] = total
    return KindSums(
        *(
            torch.where(by_site(without, part), all_of_it, part)
            for part, all_of_it in zip(kinds, whole, strict=True)
        )
    )
