"""From the keywords of GritOptimizer to checked options: former names, defaults of the mode, combinations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from grit_optim.base.checks import check_direction_momentum
from grit_optim.messages import warn
from grit_optim.options import Options
from grit_optim.options.effect import without_effect
from grit_optim.options.former import translated
from grit_optim.preconditioners.modes import MODES, mode_named


def resolve(keywords: Mapping[str, Any], former: Mapping[str, Any], base: Optimizer) -> Options:
    """The options; what is None and belongs to the mode gets the mode's default around this base.

    Warns of options that are given and have no effect.

    Args:
        keywords: every option by its name.
        former: further keywords, which may be former names.
        base: the optimizer to be wrapped.

    Raises:
        TypeError: an unknown name, or a wrong type.
        ValueError: a value out of range, options that do not go together, or that mode or base cannot use.
    """
    given = translated(dict(keywords), dict(former))
    mode = mode_named(given["precondition"])
    defaults = mode.defaults_around(base)
    options = Options.of(
        {name: defaults.get(name) if value is None else value for name, value in given.items()}
    )
    mode.check(options)
    check_direction_momentum(given["direction_momentum"], base)
    idle = without_effect(given, options, defaults, {name: kind.uses for name, kind in MODES.items()})
    if idle:
        reasons = "; ".join(f"{name}={given[name]!r}: {why}" for name, why in idle.items())
        warn(f"{len(idle)} option(s) have no effect here: {reasons}. Leave them out, or set what they need")
    return options
