"""All options together, and those that do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any, TypeVar

from grit_optim.options.declared import (
    CaptureOptions,
    CurvatureOptions,
    Group,
    PenaltyOptions,
    PreconditionOptions,
    RankOptions,
    ScheduleOptions,
)

AnyGroup = TypeVar("AnyGroup", bound=Group)


@dataclass(frozen=True)
class Options:
    """All options, one group for each subject; each option can be read by its own name too."""

    preconditioning: PreconditionOptions
    curvature: CurvatureOptions
    recording: CaptureOptions
    schedule: ScheduleOptions
    ranks: RankOptions
    penalties: PenaltyOptions

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Options:
        """Group and check flat keywords; what they leave out has its default, where no mode sets that.

        Raises:
            TypeError: an option has the wrong type.
            ValueError: an option is out of range, or two do not go together.
        """
        options = cls(
            _group(PreconditionOptions, keywords),
            _group(CurvatureOptions, keywords),
            _group(CaptureOptions, keywords),
            _group(ScheduleOptions, keywords),
            _group(RankOptions, keywords),
            _group(PenaltyOptions, keywords),
        )
        check_combinations(options)
        return options

    def __getattr__(self, name: str) -> Any:
        if name in DECLARED:
            return self.as_dict()[name]
        raise AttributeError(f"there is no option {name!r}")

    def as_dict(self) -> dict[str, Any]:
        """The options as flat, plain values, for checkpoints and results files."""
        return {
            name: value for group in fields(self) for name, value in asdict(getattr(self, group.name)).items()
        }


def _group(kind: type[AnyGroup], keywords: Mapping[str, Any]) -> AnyGroup:
    """The options of one subject."""
    return kind(**{known.name: keywords[known.name] for known in fields(kind) if known.name in keywords})


GROUPS: tuple[type[Group], ...] = (
    PreconditionOptions,
    CurvatureOptions,
    CaptureOptions,
    ScheduleOptions,
    RankOptions,
    PenaltyOptions,
)
DECLARED: dict[str, Field[Any]] = {known.name: known for kind in GROUPS for known in fields(kind)}


def check_combinations(options: Options) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    ranks, penalties = options.ranks, options.penalties
    if ranks.rank_adaptation_threshold is not None and ranks.reprojection == "none":
        raise ValueError(
            "rank_adaptation_threshold has no effect with reprojection='none'; choose how the rank is to be "
            "reduced, reprojection='balanced' (the rank is really given up) or the paper's 'two_sided' or "
            "'one_sided'"
        )
    _check_budget(ranks)
    if penalties.lambda_reproj and ranks.reprojection_k is None and ranks.rank_adaptation_threshold is None:
        raise ValueError(
            f"lambda_reproj={penalties.lambda_reproj} penalises what lies outside the leading directions, "
            "but nothing says how many those are; set reprojection_k, or rank_adaptation_threshold with a "
            "reprojection"
        )
    if options.curvature.fisher != "kfac" and options.curvature.pairing == "paper":
        raise ValueError(
            f"fisher={options.curvature.fisher!r} has no pairing='paper': its moments are those of each "
            "matrix's own gradient; leave pairing at 'kfac'"
        )
    if options.curvature.fisher != "kfac" and ranks.reprojection == "balanced":
        raise ValueError(
            f"fisher={options.curvature.fisher!r} keeps moments of gradients in the coordinates of A and B, "
            "which reprojection='balanced' changes; use fisher='kfac', or another reprojection"
        )


def _check_budget(ranks: RankOptions) -> None:
    if ranks.rank_budget is None:
        if ranks.rank_budget_steps or ranks.rank_budget_schedule != "linear":
            raise ValueError(
                "rank_budget_schedule and rank_budget_steps say how to come to rank_budget, which is None; "
                "set it too"
            )
        return
    if ranks.reprojection != "balanced":
        raise ValueError(
            f"rank_budget={ranks.rank_budget!r} needs reprojection='balanced', not {ranks.reprojection!r}: "
            "pairs are compared by the loss that balanced coordinates predict"
        )
    if ranks.rank_adaptation_threshold is not None:
        raise ValueError(
            "rank_budget and rank_adaptation_threshold are two ways to decide the ranks; choose the common "
            "budget or the threshold of each pair"
        )
    if ranks.rank_budget_steps == 0 and (ranks.has_start or ranks.rank_budget_schedule != "linear"):
        raise ValueError(
            "a start of rank_budget, and rank_budget_schedule, have no effect with rank_budget_steps=0, "
            "which goes to the end at once; set over how many steps the budget changes"
        )
