"""The report of each site's rank, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.options.declared import MODALITIES
from grit_optim.rank.selection import rank_for_energy

FILE_NAME = "grit_ranks.json"
"""The report's file in an exported adapter's folder, beside PEFT's two files."""

FORMAT = 1
"""Version of the report's JSON."""


@dataclass(frozen=True)
class SiteRank:
    """The rank of one site.

    Attributes:
        name: the site.
        rank: directions kept; 0 where the exported adapter leaves the site out.
        rank_before: directions at first.
        entropy_rank: effective rank by entropy, ``exp(−Σ p log p)`` with ``p = σ/Σσ`` (Roy and Vetterli
            2007); None where no spectrum is known.
        threshold_rank: smallest number of directions that hold the share ``threshold`` of Σσ²; None where no
            spectrum is known.
        parameters: entries of A and B that are kept.
        parameters_before: entries of A and B at first.
        predicted_loss: predicted rise of the loss by the directions that were dropped, in the loss's unit;
            None if unknown.
        modality: "vision", "audio", "cross_modal" or "text"; None in a model that is not multimodal.
    """

    name: str
    rank: int
    rank_before: int
    entropy_rank: float | None
    threshold_rank: int | None
    parameters: int
    parameters_before: int
    predicted_loss: float | None
    modality: str | None = None


def known(cost: float) -> float | None:
    """A predicted rise of the loss; None for one that is infinite, since it cannot be predicted."""
    return cost if math.isfinite(cost) else None


class RankReport(dict[str, int]):
    """Directions kept, by site name. :attr:`sites` has everything else that is known.

    Attributes:
        sites: one entry per site, in the model's order.
        threshold: τ of every ``threshold_rank``.
    """

    def __init__(self, sites: Iterable[SiteRank], threshold: float) -> None:
        self.sites = list(sites)
        self.threshold = threshold
        super().__init__({site.name: site.rank for site in self.sites})

    @property
    def parameters(self) -> int:
        """Entries of A and B that all sites together keep."""
        return sum(site.parameters for site in self.sites)

    @property
    def parameters_before(self) -> int:
        """Entries of A and B that all sites together had at first."""
        return sum(site.parameters_before for site in self.sites)

    @property
    def predicted_loss(self) -> float | None:
        """Predicted rise of the loss by all directions dropped; None if it is unknown for any site."""
        costs = [site.predicted_loss for site in self.sites]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for ``json.dumps``."""
        return {
            "format": FORMAT,
            "threshold": self.threshold,
            "parameters": self.parameters,
            "parameters_before": self.parameters_before,
            "predicted_loss": self.predicted_loss,
            "sites": [_plain(site) for site in self.sites],
        }

    def by_modality(self) -> dict[str, RankReport]:
        """The report of each part of a multimodal model, by its modality; of other models nothing."""
        there = {site.modality for site in self.sites}
        of = {m: [site for site in self.sites if site.modality == m] for m in MODALITIES if m in there}
        return {modality: RankReport(sites, self.threshold) for modality, sites in of.items()}

    def table(self) -> str:
        """The report as a text table: a line per site, per part of a multimodal model, and for all."""
        header = (
            "site",
            "rank",
            "of",
            "entropy",
            f"τ={self.threshold:g}",
            "parameters",
            "of",
            "predicted loss",
        )
        rows = [_cells(site) for site in self.sites]
        parts = [_total(report, f"{name}: ") for name, report in self.by_modality().items()]
        return _aligned([header, *rows, *parts, _total(self)])


def _total(report: RankReport, name: str = "") -> tuple[str, ...]:
    """The line of all sites together."""
    return (
        f"{name}{len(report.sites)} sites",
        str(sum(report.values())),
        str(sum(site.rank_before for site in report.sites)),
        "",
        "",
        f"{report.parameters:,}",
        f"{report.parameters_before:,}",
        _loss(report.predicted_loss),
    )


def _plain(site: SiteRank) -> dict[str, Any]:
    """A site as plain values; without a modality where there is none."""
    return {name: value for name, value in asdict(site).items() if name != "modality" or value is not None}


def _cells(site: SiteRank) -> tuple[str, ...]:
    return (
        site.name,
        str(site.rank),
        str(site.rank_before),
        "–" if site.entropy_rank is None else f"{site.entropy_rank:.1f}",
        "–" if site.threshold_rank is None else str(site.threshold_rank),
        f"{site.parameters:,}",
        f"{site.parameters_before:,}",
        _loss(site.predicted_loss),
    )


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines with columns of equal width. The first column is set left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def effective_ranks(spectrum: Tensor, threshold: float) -> list[tuple[float | None, int | None]]:
    """The effective ranks of singular values, by entropy and by threshold.

    Args:
        spectrum: singular values ``[S, r]``, descending.
        threshold: τ, the share of Σσ² to hold.

    Returns:
        For each row the two ranks; None twice where the row is zero.
    """
    entropies = linalg.effective_rank(spectrum).tolist()
    counts = rank_for_energy(spectrum.square(), threshold).tolist()
    known = (spectrum.sum(-1) > 0).tolist()
    return [(e, k) if there else (None, None) for e, k, there in zip(entropies, counts, known, strict=True)]


def product_singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Singular values of B·A, ``[r]``, descending.

    It costs two QR decompositions and one singular value decomposition of r×r; B·A is never formed.

    Args:
        a: A, ``[r, d_in]``.
        b: B, ``[d_out, r]``.
    """
    right = torch.linalg.qr(a.double().flatten(1).mT, mode="r").R
    left = torch.linalg.qr(b.double().flatten(1), mode="r").R
    values = torch.linalg.svdvals(left @ right.mT)
    return torch.nn.functional.pad(values, (0, a.shape[0] - values.shape[0]))
