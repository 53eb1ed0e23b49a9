"""Options that have no effect beside the others that are given: who is given one is told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from grit_optim.options.combined import DECLARED, Options
from grit_optim.options.declared import RankOptions

OF_THE_MODE = frozenset(
    {
        "kfac_power",
        "direction_momentum",
        "step_length",
        "fisher",
        "pairing",
        "kfac_damping",
        "kfac_inversion_device",
        "kfac_update_freq",
        "ng_warmup_steps",
    }
)
"""Options that a mode uses or does not; each mode's class says which."""


def _reprojects(options: Options) -> bool:
    return options.ranks.reprojection != "none"


def _has_fixed_rank(ranks: RankOptions) -> bool:
    """Whether a reprojection may come before the budget decides the ranks."""
    return ranks.reprojection != "none" and (
        ranks.rank_budget is None or ranks.rank_adaptation_start_step > 0
    )


def _refreshes(options: Options, uses: Collection[str]) -> bool:
    """Whether anything is derived from the factors: by the mode, or by a penalty."""
    return "kfac_update_freq" in uses or options.penalties.any


def _weighs_tokens(options: Options, uses: Collection[str]) -> bool:
    """Whether factors of tokens are in use, whose kinds can be told apart."""
    in_step = _refreshes(options, uses) and options.curvature.fisher in ("kfac", "ekfac")
    used = in_step or options.penalties.any or _reprojects(options)
    return used and options.recording.capture != "gradients"


_NEEDS: dict[str, tuple[Callable[[Options, Collection[str]], bool], str]] = {
    "kfac_update_freq": (
        _refreshes,
        "precondition is 'none' and there is no penalty, so nothing is refreshed",
    ),
    "reprojection_freq": (lambda options, _: _reprojects(options), "reprojection is 'none'"),
    "reprojection_warmup_steps": (lambda options, _: _reprojects(options), "reprojection is 'none'"),
    "reprojection_k": (
        lambda options, _: _has_fixed_rank(options.ranks) or options.penalties.lambda_reproj > 0,
        "no rank is fixed: reprojection is 'none', or rank_budget decides from the start",
    ),
    "min_lora_rank": (
        lambda options, _: options.ranks.gives_up or options.ranks.adapts,
        "the paper's projections give no rank up, and rank_adaptation_threshold is not set",
    ),
    "effective_rank_factor": (
        lambda options, _: options.ranks.gives_up,
        "the paper's projections give no rank up",
    ),
    "kfac_inversion_device": (
        lambda options, uses: "kfac_inversion_device" in uses and options.curvature.fisher != "diagonal",
        "no factor is inverted or decomposed in 'balanced' and 'none', nor with fisher='diagonal'",
    ),
    "rank_adaptation_start_step": (
        lambda options, _: options.ranks.adapts,
        "neither rank_adaptation_threshold nor rank_budget is set",
    ),
    "modality_weights": (
        _weighs_tokens,
        "no factors of tokens are in use: precondition is 'none' without a reprojection, capture is "
        "'gradients', or fisher is made of gradients",
    ),
    "regularizer_warmup_steps": (
        lambda options, _: options.penalties.any,
        "neither lambda_kfac nor lambda_reproj is set",
    ),
    "adaptive_schedule": (
        lambda options, uses: _reprojects(options) or _refreshes(options, uses),
        "precondition and reprojection are 'none' and there is no penalty, so it has no period to adapt",
    ),
}
"""What an option needs of the others, whatever the mode, and what to say where that is missing."""


def without_effect(
    given: Mapping[str, Any],
    options: Options,
    defaults: Mapping[str, Any],
    users: Mapping[str, Collection[str]],
) -> dict[str, str]:
    """The options among ``given`` that change nothing, name to why.

    An option counts as given if it is neither its default nor the mode's, so that presets, which list every
    default, are never told.

    Args:
        given: the keywords.
        options: what they became.
        defaults: the mode's own.
        users: each mode's name to those of :data:`OF_THE_MODE` that it uses.
    """
    mode = options.preconditioning.precondition
    found = {}
    for name, known in DECLARED.items():
        value = given[name]
        if value is None or value == known.default or value == defaults.get(name):
            continue
        if name in _NEEDS:
            needed, why = _NEEDS[name]
            if not needed(options, users[mode]):
                found[name] = why
        elif name in OF_THE_MODE and name not in users[mode]:
            others = ", ".join(repr(other) for other, uses in users.items() if name in uses)
            found[name] = f"precondition={mode!r} does not use it; it is for {others}"
    return found
