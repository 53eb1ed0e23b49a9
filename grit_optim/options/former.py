"""Former names of options: translated to those of today, or refused with what to do."""

from __future__ import annotations

from typing import Any

from grit_optim.messages import nearest
from grit_optim.options.checks import budget_value
from grit_optim.options.combined import DECLARED

_CONSTANT = "is a constant of each mode now, since no other value was better (docs/findings.md); leave it out"
GONE = {
    "caution": _CONSTANT,
    "gradient_share": _CONSTANT,
    "a_step_ratio": f"{_CONSTANT}, or give A and B parameter groups with rates of their own",
    "rank_budget_tolerance": "is 1 % always, since no other value was ever measured; leave it out",
}
FORMER = ("enable_rank_adaptation", "preserve_norm", "rank_budget_start", "rank_regrowth", *GONE)


def translated(options: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """The options with what their former names say.

    ``enable_rank_adaptation`` says whether ``rank_adaptation_threshold`` counts (0.99 if it is not given),
    ``rank_budget_start`` is the first of the two in ``rank_budget``, ``preserve_norm=False`` is
    ``step_length="natural"``, and ``rank_regrowth`` follows from a budget that rises.

    Raises:
        TypeError: a name that is not known, an option that is gone, or a former one of the wrong type.
        ValueError: two names for one thing disagree, or a former start of the budget is out of range.
    """
    options = dict(options)
    for name in former:
        if name in GONE:
            raise TypeError(f"{name} {GONE[name]}")
        if name not in FORMER:
            close = nearest(name, DECLARED)
            hint = f"; did you mean {close!r}?" if close else "; docs/options.md lists all options"
            raise TypeError(f"GritOptimizer has no option {name!r}{hint}")
    for name in ("enable_rank_adaptation", "preserve_norm", "rank_regrowth"):
        if not isinstance(former.get(name, False), bool):
            raise TypeError(f"{name} must be True or False, got {former[name]!r}")
    _adaptation(options, former)
    _budget(options, former)
    if "preserve_norm" in former:
        _norm(options, former["preserve_norm"])
    return options


def _norm(options: dict[str, Any], preserved: bool) -> None:
    given = options.get("step_length")
    if given is not None and (given == "natural") == preserved:
        raise ValueError(
            f"preserve_norm={preserved} contradicts step_length={given!r}: preserve_norm=False is "
            "step_length='natural', and True is any other; leave preserve_norm out"
        )
    if not preserved:
        options["step_length"] = "natural"


def _adaptation(options: dict[str, Any], former: dict[str, Any]) -> None:
    if former.get("enable_rank_adaptation", False):
        if options.get("rank_adaptation_threshold") is None:
            options["rank_adaptation_threshold"] = 0.99
    elif "enable_rank_adaptation" in former:
        options["rank_adaptation_threshold"] = None


def _budget(options: dict[str, Any], former: dict[str, Any]) -> None:
    start, end = former.get("rank_budget_start"), options.get("rank_budget")
    if start is not None:
        budget_value("rank_budget_start", start)
        if end is None or isinstance(end, tuple | list):
            raise ValueError(
                f"rank_budget_start={start!r} is the first of the two numbers in rank_budget=(start, end), "
                f"got rank_budget={end!r}; give both there"
            )
        options["rank_budget"] = (start, end)
    if "rank_regrowth" not in former:
        return
    budget, regrowth = options.get("rank_budget"), former["rank_regrowth"]
    if _rises(budget) is (not regrowth):
        raise ValueError(
            f"rank_regrowth={regrowth} contradicts rank_budget={budget!r}: directions are given back where "
            "rank_budget=(start, end) rises, and only there, since elsewhere it made the loss no lower "
            "(docs/findings.md); leave rank_regrowth out"
        )


def _rises(budget: Any) -> bool | None:
    """Whether a budget rises; None for a share and a number of parameters, which only a model can compare."""
    if not isinstance(budget, tuple | list) or len(budget) != 2:
        return False
    start, end = budget
    return start < end if isinstance(start, float) == isinstance(end, float) else None
