"""Copy one step's state to the host, and work out its numbers per site there.

Taking a snapshot starts copies and waits for nothing. Eigenvalues and all other numbers are computed on the
host, once the copies have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.options.declared import TOKEN_KINDS
from grit_optim.preconditioners.held_gradients import Outcome
from grit_optim.profiling import HostCopy
from grit_optim.telemetry import spectra

FACTORS = {"a": "activation", "g": "gradient"}
_OF_KINDS = ("share", "activation", "gradient")
_OUTCOME = ("gradient_norm", "without", "turned", "cosine")


_ENDS = tuple(f"_{kind}" for kind in TOKEN_KINDS)


class Snapshot:
    """The factors, ranks and outcomes of one step.

    Args:
        curvatures: the buckets' curvatures.
        outcomes: what the step did, per bucket and side.
        scalars: further numbers by name, on any device.

    Attributes:
        names: the sites, in the order of every column.
    """

    def __init__(
        self,
        curvatures: Sequence[BucketCurvature],
        outcomes: Sequence[Outcome],
        scalars: Mapping[str, Tensor | float | None],
    ) -> None:
        self.names = [name for curvature in curvatures for name in curvature.bucket.names()]
        all_sites = [site for curvature in curvatures for site in curvature.bucket.sites]
        self._sees_kinds = [site.modality in ("text", None) for site in all_sites]
        self._sizes = [len(curvature.bucket.sites) for curvature in curvatures]
        self._outcomes = list(outcomes)
        self._plain = {name: value for name, value in scalars.items() if not isinstance(value, Tensor)}
        tensors = {f"scalar {name}": value for name, value in scalars.items() if isinstance(value, Tensor)}
        for i, curvature in enumerate(curvatures):
            tensors.update({f"{i} {name}": value for name, value in _tensors_of(curvature).items()})
        for i, outcome in enumerate(self._outcomes):
            parts = {name: getattr(outcome, name) for name in _OUTCOME}
            tensors.update(
                {f"outcome {i} {name}": value for name, value in parts.items() if value is not None}
            )
        self._copy = HostCopy(tensors)

    def arrived(self) -> bool:
        """Whether the copies are on the host, so that reading waits for nothing."""
        return self._copy.arrived()

    def scalars(self) -> dict[str, float | None]:
        """The further numbers by name; None for one that is missing or not finite."""
        tensors = self._copy.read()
        read = {n.removeprefix("scalar "): t.item() for n, t in tensors.items() if n.startswith("scalar ")}
        return {name: _plain(value) for name, value in {**self._plain, **read}.items()}

    def columns(self, top_eigenvalues: int = 0, eigenvectors_of: int = 0) -> dict[str, list[Any]]:
        """A list per quantity, with an entry per site in the order of ``names``.

        An entry is None where there is no finite number.

        Args:
            top_eigenvalues: how many leading eigenvalues of each factor to add, as ``eigenvalues_a`` and
                ``eigenvalues_g``.
            eigenvectors_of: for how many of the first sites to add the eigenvectors, as ``eigenvectors_a``
                and ``eigenvectors_g``: matrices whose columns they are.
        """
        tensors = self._copy.read()
        columns: dict[str, list[Any]] = {}
        for i in range(len(self._sizes)):
            wanted = max(0, eigenvectors_of - sum(self._sizes[:i]))
            own = {n.removeprefix(f"{i} "): t for n, t in tensors.items() if n.startswith(f"{i} ")}
            found = _columns_of(own, top_eigenvalues, wanted)
            for name, values in found.items():
                columns.setdefault(name, []).extend(values)
        for name in [name for name in columns if name.endswith(_ENDS)]:
            columns[name] = [
                v if own else None for v, own in zip(columns[name], self._sees_kinds, strict=True)
            ]
        for name, values in self._outcome_columns(tensors).items():
            columns[name] = values
        return {name: [_plain(value) for value in values] for name, values in columns.items()}

    def _outcome_columns(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
        """Norms and angles (degrees) per site, a column for each side."""
        columns: dict[str, list[Any]] = {}
        starts = [sum(self._sizes[:i]) for i in range(len(self._sizes))]
        for i, outcome in enumerate(self._outcomes):
            parts = {name: tensors.get(f"outcome {i} {name}") for name in _OUTCOME}
            named = {
                "gradient_norm": parts["gradient_norm"],
                "norm_without": parts["without"],
                "norm_with": parts["turned"],
            }
            if parts["cosine"] is not None:
                named["angle"] = parts["cosine"].double().clamp(-1, 1).acos() * (180 / math.pi)
            for name, values in named.items():
                if values is None:
                    continue
                column = columns.setdefault(f"{name}_{outcome.side}", [None] * len(self.names))
                for position, value in zip(outcome.positions, values.tolist(), strict=True):
                    column[starts[outcome.bucket] + position] = value
        return columns


def _tensors_of(curvature: BucketCurvature) -> dict[str, Tensor]:
    """The tensors of one bucket that a snapshot copies, by name."""
    factors, ranks, kinds = curvature.factors, curvature.ranks, curvature.kinds
    of_kinds = {} if kinds is None else {f"kinds {name}": getattr(kinds, name) for name in _OF_KINDS}
    return {
        **of_kinds,
        "activation": factors.activation,
        "gradient": factors.gradient,
        "rank": ranks.rank,
        "in_use": ranks.in_use,
        "samples": factors.activation_samples,
        "damping": curvature.damping_used,
        "engaged": curvature.engaged,
    }


def _columns_of(tensors: Mapping[str, Tensor], top: int, eigenvectors: int) -> dict[str, list[Any]]:
    """The columns of one bucket, an entry per site."""
    columns: dict[str, list[Any]] = {
        "rank": tensors["rank"].tolist(),
        "samples": tensors["samples"].long().tolist(),
        "engaged": tensors["engaged"].tolist(),
        "damping_A": tensors["damping"][0].tolist(),
        "damping_B": tensors["damping"][1].tolist(),
    }
    for letter, factor in FACTORS.items():
        spectrum, vectors = spectra.decompose(tensors[factor], tensors["in_use"])
        for name, values in spectra.scalars(spectrum, tensors["in_use"]).items():
            columns[f"{name}_{letter}"] = values.tolist()
        if top:
            columns[f"eigenvalues_{letter}"] = spectrum[:, :top].tolist()
        if eigenvectors:
            columns[f"eigenvectors_{letter}"] = vectors[:eigenvectors].tolist()
    return {**columns, **_columns_of_kinds(tensors)}


def _columns_of_kinds(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Share of the tokens, effective rank and trace by kind of token, where kinds are told apart."""
    if "kinds share" not in tensors:
        return {}
    share, columns = tensors["kinds share"], {}
    for k, kind in enumerate(TOKEN_KINDS):
        columns[f"share_{kind}"] = share[:, k].tolist()
        for letter, factor in FACTORS.items():
            part = tensors[f"kinds {factor}"][:, k] / share[:, k, None, None]
            there = part.isfinite().all(-1).all(-1)
            part = part.where(there[:, None, None], part.new_zeros(()))
            spectrum, _ = spectra.decompose(part, tensors["in_use"])
            found = spectra.scalars(spectrum, tensors["in_use"])
            for name in ("effective_rank", "trace"):
                columns[f"{name}_{letter}_{kind}"] = found[name].where(there, math.nan).tolist()
    return columns


def _plain(value: Any) -> Any:
    """A value as JSON takes it: numbers with six significant digits, None for one that is not finite."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
