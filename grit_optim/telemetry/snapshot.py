"""One step's state on its way to the host, and what it says per site.

Taking a snapshot starts copies and waits for nothing; eigenvalues and all else are worked out on the host
from the copies, once those have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.preconditioners.held_gradients import Outcome
from grit_optim.profiling import HostCopy
from grit_optim.telemetry import spectra

FACTORS = {"a": "activation", "g": "gradient"}


class Snapshot:
    """The factors, ranks and outcomes of one step.

    Args:
        curvatures: the buckets' curvatures.
        outcomes: what the step did.
        scalars: further numbers, on any device, by name.
    """

    def __init__(
        self,
        curvatures: Sequence[BucketCurvature],
        outcomes: Sequence[Outcome],
        scalars: Mapping[str, Tensor | float | None],
    ) -> None:
        self.names = [name for curvature in curvatures for name in curvature.bucket.names()]
        self._sizes = [len(curvature.bucket.sites) for curvature in curvatures]
        self._outcomes = list(outcomes)
        self._plain = {name: value for name, value in scalars.items() if not isinstance(value, Tensor)}
        tensors = {f"scalar {name}": value for name, value in scalars.items() if isinstance(value, Tensor)}
        for i, curvature in enumerate(curvatures):
            tensors.update({f"{i} {name}": value for name, value in _tensors_of(curvature).items()})
        for i, outcome in enumerate(self._outcomes):
            parts = {n: getattr(outcome, n) for n in ("gradient_norm", "without", "turned", "cosine")}
            tensors.update(
                {f"outcome {i} {name}": value for name, value in parts.items() if value is not None}
            )
        self._copy = HostCopy(tensors)

    def arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return self._copy.arrived()

    def scalars(self) -> dict[str, float | None]:
        """The further numbers; None where there is none, or no finite one."""
        tensors = self._copy.read()
        read = {n.removeprefix("scalar "): t.item() for n, t in tensors.items() if n.startswith("scalar ")}
        return {name: _plain(value) for name, value in {**self._plain, **read}.items()}

    def columns(self, top_eigenvalues: int = 0, eigenvectors_of: int = 0) -> dict[str, list[Any]]:
        """Per quantity a list with an entry per site, in the order of ``names``; None where there is no finite number.

        Args:
            top_eigenvalues: how many leading eigenvalues of each factor to add (``eigenvalues_a``,
                ``eigenvalues_g``).
            eigenvectors_of: for how many of the first sites to add the eigenvectors, as columns
                (``eigenvectors_a``, …).
        """
        tensors = self._copy.read()
        columns: dict[str, list[Any]] = {}
        for i in range(len(self._sizes)):
            wanted = max(0, eigenvectors_of - sum(self._sizes[:i]))
            found = _columns_of({n: tensors[f"{i} {n}"] for n in _NAMES}, top_eigenvalues, wanted)
            for name, values in found.items():
                columns.setdefault(name, []).extend(values)
        for name, values in self._outcome_columns(tensors).items():
            columns[name] = values
        return {name: [_plain(value) for value in values] for name, values in columns.items()}

    def _outcome_columns(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
        """Norms and angles per site and side."""
        columns: dict[str, list[Any]] = {}
        starts = [sum(self._sizes[:i]) for i in range(len(self._sizes))]
        for i, outcome in enumerate(self._outcomes):
            parts = {
                n: tensors.get(f"outcome {i} {n}") for n in ("gradient_norm", "without", "turned", "cosine")
            }
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


_NAMES = ("activation", "gradient", "rank", "in_use", "samples", "damping", "engaged")


def _tensors_of(curvature: BucketCurvature) -> dict[str, Tensor]:
    factors = curvature.factors
    values = (
        factors.activation, factors.gradient, curvature.ranks.rank, curvature.ranks.in_use, factors.activation_samples,
        curvature.damping_used, curvature.a_ready & curvature.b_ready,
    )  # fmt: skip
    return dict(zip(_NAMES, values, strict=True))


def _columns_of(tensors: Mapping[str, Tensor], top: int, eigenvectors: int) -> dict[str, list[Any]]:
    """What one bucket's tensors say, an entry per site."""
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
    return columns


def _plain(value: Any) -> Any:
    """As JSON takes it: six significant digits, None for what is not finite."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
