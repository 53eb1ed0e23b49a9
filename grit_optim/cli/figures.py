"""Draw a run's curvature. Needs matplotlib. Public functions take a :class:`RunLog` and return a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from grit_optim.cli.run_log import RunError, RunLog, by_modality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow: any colour vision tells its colours apart. Markers and lines differ
# too, for prints in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
_SEQUENTIAL, _DIVERGING = "cividis", "PuOr"
FACTORS = {"a": r"activation factor $\Sigma_a$", "g": r"gradient factor $\Sigma_g$"}
_STEP = "training step"


def _panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styles() -> Iterator[dict[str, Any]]:
    """Colour, marker and line of one curve after another."""
    for colour, marker, line in zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_LINES), strict=False):
        yield {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.4}


def _members(run: RunLog) -> dict[str, list[int]]:
    """The positions of each projection's sites, by its name."""
    members: dict[str, list[int]] = {}
    for i, site in enumerate(run.sites):
        members.setdefault(site.projection, []).append(i)
    return members


def _grid(axis: Axes) -> None:
    """Draw faint lines behind the curves."""
    axis.grid(alpha=0.3, linewidth=0.6)


def _numbers(values: Sequence[Any]) -> list[float]:
    """The values that are not None."""
    return [value for value in values if value is not None]


# -------------------------------------------------------------------- spectra


def spectrum(run: RunLog, factor: str) -> Figure:
    """Eigenvalues by projection, a line per recorded step.

    An eigenvalue is shown as its share of the trace, median over layers.

    Args:
        run: recorded with ``log_fisher_spectrum``.
        factor: "a" or "g".

    Raises:
        RunError: the run holds no eigenvalues, or none that is not zero.
    """
    members = _members(run)
    steps = [
        step
        for step in run.having(f"eigenvalues_{factor}")
        if any(_numbers(step["sites"][f"trace_{factor}"]))
    ]
    if not steps:
        raise RunError(f"{run.path}: no recorded step has seen a gradient that is not zero; train longer")
    columns = min(4, len(members))
    rows = -(-len(members) // columns)
    figure, axes = _panels(rows, columns, 1.2 + 2.5 * columns, 0.8 + 2.3 * rows, sharex=True, sharey=True)
    scale = _step_colours([step["step"] for step in steps])
    for axis, (projection, sites) in zip(axes, members.items(), strict=False):
        for step in steps:
            shares = _median_shares(step["sites"], factor, sites)
            axis.plot(
                range(1, len(shares) + 1),
                shares,
                color=scale.to_rgba(step["step"]),
                linewidth=1.3,
                marker=".",
            )
        axis.set_title(f"{projection} ({len(sites)} layers)" if len(sites) > 1 else projection, fontsize=10)
        axis.set_yscale("log")
        _grid(axis)
    for axis in axes[len(members) :]:
        axis.set_visible(False)
    figure.supxlabel("eigenvalue, largest first", fontsize=10)
    figure.supylabel("share of the trace", fontsize=10)
    figure.suptitle(f"Spectrum of the {FACTORS[factor]}, median over layers", fontsize=11)
    figure.colorbar(scale, ax=axes, label=_STEP, fraction=0.03)
    return figure


def _step_colours(steps: Sequence[int]) -> Any:
    """The colour of each step, from the first to the last."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(min(steps), max(max(steps), min(steps) + 1)), _SEQUENTIAL)


def _median_shares(columns: dict[str, list[Any]], factor: str, sites: Sequence[int]) -> list[float]:
    """Each eigenvalue over the trace, median over the sites; NaN for zero, which has no logarithm."""
    spectra = [(columns[f"eigenvalues_{factor}"][i], columns[f"trace_{factor}"][i]) for i in sites]
    shares = [[value / trace for value in values] for values, trace in spectra if trace]
    depth = min((len(values) for values in shares), default=0)
    medians = [statistics.median(values[k] for values in shares) for k in range(depth)]
    return [value if value > 0 else float("nan") for value in medians]


# -------------------------------------------------------------------- effective rank


def effective_rank(run: RunLog) -> Figure:
    """Effective rank of both factors at the latest step, a cell per layer and projection."""
    last = run.having("effective_rank_a")[-1]
    layers = sorted({site.layer for site in run.sites}, key=lambda layer: -1 if layer is None else layer)
    projections = list(_members(run))
    figure, axes = _panels(1, 2, 2.4 + 1.5 * len(projections), 1.4 + 0.42 * len(layers), sharey=True)
    top = max(site["rank"] for site in run.start["sites"])
    for axis, (letter, title) in zip(axes, FACTORS.items(), strict=True):
        grid = [[float("nan")] * len(projections) for _ in layers]
        for site, value in zip(run.sites, last["sites"][f"effective_rank_{letter}"], strict=True):
            if value:
                grid[layers.index(site.layer)][projections.index(site.projection)] = value
        image = axis.imshow(grid, cmap=_SEQUENTIAL, vmin=1, vmax=top, aspect="auto")
        axis.set_xticks(range(len(projections)), projections, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(layers)), ["–" if layer is None else str(layer) for layer in layers])
        axis.set_title(title, fontsize=10)
        if len(layers) <= 40:
            _annotate(axis, grid, (1 + top) / 2)
        axis.set_xlabel("projection")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=f"effective rank\n(directions, of {top})")
    figure.suptitle(f"Effective rank at step {last['step']}", fontsize=11)
    return figure


def _annotate(axis: Axes, grid: Sequence[Sequence[float]], middle: float) -> None:
    """Write each cell's number, light on dark and dark on light."""
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            if value == value:
                colour = "black" if value > middle else "white"
                axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)


def ranks(run: RunLog) -> Figure:
    """Rank kept and effective ranks over the steps, a line per projection: mean over its layers."""
    titles = {
        "rank": "rank kept",
        "effective_rank_a": r"effective rank of $\Sigma_a$",
        "effective_rank_g": r"effective rank of $\Sigma_g$",
    }
    figure, axes = _means(run, titles, _members(run), sharey=True)
    axes[0].set_ylabel("directions, mean over layers")
    axes[0].set_ylim(bottom=0)
    return figure


def _means(
    run: RunLog, titles: dict[str, str], members: dict[str, list[int]], sharey: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each of three columns, with a line for each set of sites: the mean over the steps."""
    figure, axes = _panels(1, 3, 11, 3.6, sharey=sharey)
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for style, (name, sites) in zip(_styles(), members.items(), strict=False):
            steps = run.having(column)
            means = [_mean_of_positive([step["sites"][column][i] for i in sites]) for step in steps]
            axis.plot([step["step"] for step in steps], means, label=name, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(_STEP)
        _grid(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure, axes


def _mean_of_positive(values: Sequence[Any]) -> float:
    """Mean over the values above zero (a factor that has seen nothing has rank 0); NaN without any."""
    return statistics.fmean([value for value in _numbers(values) if value > 0] or [float("nan")])


# -------------------------------------------------------------------- eigenvectors


def eigenvectors(run: RunLog) -> Figure:
    """Eigenvectors of both factors at the latest step that holds them, for the first sites."""
    last = run.having("eigenvectors_a")[-1]
    count = len(last["sites"]["eigenvectors_a"])
    figure, axes = _panels(2, count, 1.6 + 2.6 * count, 6)
    for row, (letter, title) in enumerate(FACTORS.items()):
        for column, vectors in enumerate(last["sites"][f"eigenvectors_{letter}"]):
            axis, size = axes[row * count + column], len(vectors)
            image = axis.imshow(
                vectors, cmap=_DIVERGING, vmin=-1, vmax=1, extent=(0.5, size + 0.5, size + 0.5, 0.5)
            )
            axis.set_title(f"{run.sites[column]}\n{title}", fontsize=9)
            axis.set_xlabel("eigenvector, largest eigenvalue first", fontsize=8)
            axis.set_ylabel("rank coordinate", fontsize=8)
            axis.tick_params(labelsize=8)
    figure.colorbar(image, ax=axes, label="entry of the eigenvector", shrink=0.6)
    figure.suptitle(f"Eigenvectors at step {last['step']}", fontsize=11)
    return figure


# -------------------------------------------------------------------- gradients


def gradients(run: RunLog) -> Figure:
    """‖∇‖, the update's norm with and without curvature, and the angle between the two, over sites."""
    figure, axes = _panels(1, 3, 11, 3.6)
    looks = dict(zip("AB", _styles(), strict=False))
    for side, style in looks.items():
        _band(axes[0], run, f"gradient_norm_{side}", f"∇{side}", style)
        for column, line, label in (
            (f"norm_with_{side}", "-", "with"),
            (f"norm_without_{side}", ":", "without"),
        ):
            if any(column in step["sites"] for step in run.steps):
                _band(
                    axes[1],
                    run,
                    column,
                    f"{side}, {label} curvature",
                    {**style, "linestyle": line},
                    shade=False,
                )
        if any(f"angle_{side}" in step["sites"] for step in run.steps):
            _band(axes[2], run, f"angle_{side}", side, style)
    for axis, title, label in zip(
        axes,
        ("gradient of the loss", "update", "turned by the curvature"),
        ("Frobenius norm ‖∇‖ per matrix", "Frobenius norm per matrix", "angle (degrees)"),
        strict=True,
    ):
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(label)
        axis.set_xlabel(_STEP)
        _grid(axis)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
        else:
            axis.text(0.5, 0.5, "not known in this mode", ha="center", transform=axis.transAxes)
    for axis in axes[:2]:
        if axis.lines:
            axis.set_yscale("log")
    axes[2].set_ylim(0, 90)
    figure.suptitle("Median over sites, band from the lowest to the highest tenth", fontsize=11)
    return figure


def _band(
    axis: Axes, run: RunLog, column: str, label: str, style: dict[str, Any], shade: bool = True
) -> None:
    """Median over sites with a band from the 10th to the 90th percentile."""
    steps, quantiles = [], []
    for step in run.having(column):
        values = [v for v in _numbers(step["sites"][column]) if v > 0]
        if values:
            cuts = statistics.quantiles(values, n=10) if len(values) > 1 else values * 9
            steps.append(step["step"])
            quantiles.append((cuts[0], statistics.median(values), cuts[-1]))
    low, middle, high = zip(*quantiles, strict=True) if quantiles else ((), (), ())
    axis.plot(steps, middle, label=label, **style)
    if shade:
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


# -------------------------------------------------------------------- modalities


def modalities(run: RunLog) -> Figure:
    """Effective ranks and the trace of Σ_g over the steps, a line per part of a multimodal model.

    A line is the mean over the part's pairs.

    Raises:
        RunError: the model has no parts.
    """
    members = by_modality(run)
    if not members:
        raise RunError(f"{run.path} is of a model that is not multimodal, so there are no parts to compare")
    titles = {
        "effective_rank_a": r"effective rank of $\Sigma_a$",
        "effective_rank_g": r"effective rank of $\Sigma_g$",
        "trace_g": r"trace of $\Sigma_g$",
    }
    figure, axes = _means(run, titles, members)
    axes[0].set_ylabel("mean over the part's pairs")
    axes[2].set_yscale("log")
    return figure


FIGURES: dict[str, Callable[[RunLog], Figure]] = {
    "spectrum_a": lambda run: spectrum(run, "a"),
    "spectrum_g": lambda run: spectrum(run, "g"),
    "effective_rank": effective_rank,
    "ranks": ranks,
    "eigenvectors": eigenvectors,
    "gradients": gradients,
}


PARTS: dict[str, Callable[[RunLog], Figure]] = {"modalities": modalities}
"""Figures that only the run of a multimodal model has."""


def figures_of(run: RunLog) -> list[str]:
    """Names of the figures that are drawn of a run."""
    return [*FIGURES, *(PARTS if by_modality(run) else ())]


def make(run: RunLog, kind: str) -> Figure:
    """The figure of that name.

    Raises:
        RunError: the run does not hold what it needs.
    """
    if not run.steps:
        raise RunError(f"{run.path} holds no step yet; wait for the first record")
    return (FIGURES | PARTS)[kind](run)
