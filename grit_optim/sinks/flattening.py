"""Turn records into tags with one number each, as TensorBoard and Weights & Biases take them."""

from __future__ import annotations

import math
import statistics
from typing import Any

from grit_optim.sinks.json_lines import Record


class Flattener:
    """Turns records into ``{tag: number}``: totals under ``GRIT/``, sites under ``Fisher/<site>/``.

    Args:
        per_site: also give each site's numbers.
    """

    def __init__(self, per_site: bool) -> None:
        self.per_site = per_site
        self._names: list[str] = []

    def __call__(self, record: Record) -> dict[str, float]:
        """The finite numbers of a record by tag; none for a start record, whose site names are remembered."""
        if record["kind"] == "start":
            self._names = [site["name"] for site in record["sites"]]
            return {}
        if record["kind"] == "end":
            found = [
                (name, key, value) for name, site in record["final"].items() for key, value in site.items()
            ]
            return {f"Fisher/{name}/{key}": float(value) for name, key, value in found if _is_number(value)}
        flat = {f"GRIT/{name}": float(value) for name, value in record.items() if _is_number(value)}
        flat.update({f"GRIT/seconds/{name}": value for name, value in record["stage_seconds"].items()})
        for name, column in record["sites"].items():
            numbers = [value for value in column if _is_number(value)]
            if numbers:
                spread = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
                flat.update({f"GRIT/{name}/{which}": float(value) for which, value in spread.items()})
            if self.per_site:
                flat.update(self._of_sites(name, column))
        return flat

    def _of_sites(self, name: str, column: list[Any]) -> dict[str, float]:
        """One quantity of every site; eigenvalues one by one, counted from 0."""
        flat = {}
        for site, value in zip(self._names, column, strict=False):
            if _is_number(value):
                flat[f"Fisher/{site}/{name}"] = float(value)
            elif name.startswith("eigenvalues") and value is not None:
                flat.update(
                    {f"Fisher/{site}/eig_{name[-1]}_{i}": v for i, v in enumerate(value) if _is_number(v)}
                )
        return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
