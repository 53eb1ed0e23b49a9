"""The options of GritOptimizer, validated, and the base optimizers that cannot be wrapped."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

PRECONDITIONS = ("spectral", "steer", "eigenbasis", "balanced", "inverse", "none")
PAIRINGS = ("kfac", "paper")
FISHERS = ("kfac", "diagonal", "block_diagonal", "ekfac")
DAMPINGS = ("relative", "absolute")
PAPER_PROJECTIONS = ("two_sided", "one_sided")
REPROJECTIONS = ("none", "balanced", *PAPER_PROJECTIONS)
BUDGET_SCHEDULES = ("linear", "cosine", "adaptive")


@dataclass(frozen=True)
class Options:
    """Validated options; GritOptimizer's docstring explains each, its signature holds the defaults."""

    precondition: str
    pairing: str
    fisher: str
    fisher_decay: float | None
    kfac_update_freq: int
    kfac_min_samples: int
    kfac_damping: float
    damping: str
    kfac_power: float
    direction_momentum: float | str
    gradient_share: float
    caution: float
    step_length: float | str
    a_step_ratio: float
    kfac_inversion_device: str | None
    cov_update_freq: int
    max_tokens: int | None
    ng_warmup_steps: int
    preserve_norm: bool
    max_grad_norm: float | None
    reprojection: str
    reprojection_freq: int
    reprojection_k: int | None
    reprojection_warmup_steps: int
    enable_rank_adaptation: bool
    rank_adaptation_threshold: float
    min_lora_rank: int
    rank_adaptation_start_step: int
    rank_budget: float | None
    rank_budget_start: float | None
    rank_budget_schedule: str
    rank_budget_steps: int
    rank_budget_tolerance: float
    rank_regrowth: bool
    lambda_kfac: float
    lambda_reproj: float
    regularizer_warmup_steps: int
    adaptive_schedule: bool

    def __post_init__(self) -> None:
        _one_of("precondition", self.precondition, PRECONDITIONS)
        _one_of("pairing", self.pairing, PAIRINGS)
        _one_of("fisher", self.fisher, FISHERS)
        _one_of("damping", self.damping, DAMPINGS)
        _one_of("reprojection", self.reprojection, REPROJECTIONS)
        _one_of("rank_budget_schedule", self.rank_budget_schedule, BUDGET_SCHEDULES)
        for name in ("kfac_update_freq", "cov_update_freq", "reprojection_freq"):
            _whole(name, getattr(self, name), least=1)
        for name in _FROM_ZERO:
            _whole(name, getattr(self, name), least=0)
        for name in ("min_lora_rank", "rank_budget_steps"):
            _whole(name, getattr(self, name), least=0)
        for name in ("rank_budget", "rank_budget_start"):
            if getattr(self, name) is not None:
                check_budget_value(name, getattr(self, name))
        _real("rank_budget_tolerance", self.rank_budget_tolerance, "from 0 up", lambda x: x >= 0)
        for name in ("max_tokens", "reprojection_k"):
            _whole(name, getattr(self, name), least=1, optional=True)
        for name in ("kfac_damping", "a_step_ratio"):
            _real(name, getattr(self, name), "above 0", lambda x: x > 0)
        for name in ("kfac_power", "lambda_kfac", "lambda_reproj"):
            _real(name, getattr(self, name), "from 0 up", lambda x: x >= 0)
        if self.direction_momentum != "base":
            _real("direction_momentum", self.direction_momentum, "in [0, 1), or 'base'", lambda x: 0 <= x < 1)
        _real("gradient_share", self.gradient_share, "in [0, 1]", lambda x: 0 <= x <= 1)
        _real("caution", self.caution, "in [0, 1]", lambda x: 0 <= x <= 1)
        if self.step_length != "base":
            _real(
                "step_length",
                self.step_length,
                "above 0, or 'base' for the base's own length",
                lambda x: x > 0,
            )
        _real("rank_adaptation_threshold", self.rank_adaptation_threshold, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.fisher_decay is not None:
            _real(
                "fisher_decay",
                self.fisher_decay,
                "in [0, 1), or None for the running mean",
                lambda x: 0 <= x < 1,
            )
        if self.max_grad_norm is not None:
            _real("max_grad_norm", self.max_grad_norm, "above 0, or None for no limit", lambda x: x > 0)
        for name in ("preserve_norm", "enable_rank_adaptation", "rank_regrowth", "adaptive_schedule"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_device()
        self._check_combinations()

    def _check_device(self) -> None:
        if self.kfac_inversion_device is None:
            return
        try:
            torch.device(self.kfac_inversion_device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"kfac_inversion_device={self.kfac_inversion_device!r} is no device; use None (where the parameters are), "
                "'cpu' or 'cuda'"
            ) from error

    def _check_combinations(self) -> None:
        if self.enable_rank_adaptation and self.reprojection == "none":
            raise ValueError(
                "enable_rank_adaptation=True has no effect with reprojection='none'; choose how the rank is to be reduced, "
                "reprojection='balanced' (the rank is really given up) or the paper's 'two_sided' or 'one_sided'"
            )
        self._check_budget()
        if self.precondition == "balanced" and self.pairing == "paper":
            raise ValueError(
                "precondition='balanced' has no pairing='paper': balanced coordinates are those in which both factors are "
                "diagonal; leave pairing at 'kfac'"
            )
        if self.lambda_reproj and self.reprojection_k is None and not self.enable_rank_adaptation:
            raise ValueError(
                f"lambda_reproj={self.lambda_reproj} penalises what lies outside the leading directions, but nothing says how "
                "many those are; set reprojection_k, or enable_rank_adaptation=True with a reprojection"
            )
        self._check_fisher()

    def _check_fisher(self) -> None:
        """Gradient moments are kept in the coordinates of A and B, and belong to their own matrix by definition."""
        if self.fisher == "kfac":
            return
        if self.pairing == "paper":
            raise ValueError(
                f"fisher={self.fisher!r} has no pairing='paper': its moments are those of each matrix's own gradient; leave "
                "pairing at 'kfac'"
            )
        if "balanced" in (self.precondition, self.reprojection):
            raise ValueError(
                f"fisher={self.fisher!r} keeps moments of gradients in the coordinates of A and B, which 'balanced' changes; "
                "use fisher='kfac', or another precondition and reprojection"
            )
        if self.precondition == "eigenbasis" and self.fisher in ("diagonal", "ekfac"):
            advice = {
                "diagonal": "a diagonal Fisher's eigenbasis is the one that A and B are in: use precondition='none'",
                "ekfac": "in the eigenbasis of fisher='kfac' Adam's second moments are EK-FAC's eigenvalues: use that",
            }[self.fisher]
            raise ValueError(f"fisher={self.fisher!r} adds nothing to precondition='eigenbasis': {advice}")

    def _check_budget(self) -> None:
        if self.rank_regrowth and not (self.enable_rank_adaptation or self.rank_budget is not None):
            raise ValueError(
                "rank_regrowth=True has no effect while nothing adapts the rank; pass rank_budget=… or "
                "enable_rank_adaptation=True"
            )
        if self.rank_regrowth and self.reprojection != "balanced":
            raise ValueError(
                f"rank_regrowth=True needs reprojection='balanced', not {self.reprojection!r}: only there a rank is given up, "
                "so that it can be taken back"
            )
        if self.rank_budget is None:
            if (
                self.rank_budget_start is not None
                or self.rank_budget_steps
                or self.rank_budget_schedule != "linear"
            ):
                raise ValueError(
                    "rank_budget_start, rank_budget_schedule and rank_budget_steps say how to come to rank_budget, which is "
                    "None; set it too"
                )
            return
        if self.reprojection != "balanced":
            raise ValueError(
                f"rank_budget={self.rank_budget!r} needs reprojection='balanced', not {self.reprojection!r}: sites are "
                "compared by the loss that balanced coordinates predict"
            )
        if self.enable_rank_adaptation:
            raise ValueError(
                "rank_budget and enable_rank_adaptation are two ways to decide the ranks; choose the common budget or the "
                "threshold of each site"
            )
        if self.rank_budget_steps == 0 and (
            self.rank_budget_start is not None or self.rank_budget_schedule != "linear"
        ):
            raise ValueError(
                "rank_budget_start and rank_budget_schedule have no effect with rank_budget_steps=0, which goes to rank_budget "
                "at once; set over how many steps the budget changes"
            )

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for checkpoints and results files."""
        return asdict(self)


_FROM_ZERO = (
    "kfac_min_samples", "ng_warmup_steps", "reprojection_warmup_steps", "rank_adaptation_start_step",
    "regularizer_warmup_steps",
)  # fmt: skip
OPTION_NAMES = frozenset(option.name for option in fields(Options))


def check_budget_value(name: str, value: object) -> None:
    """Refuse what is neither a share of the parameters nor a number of them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a float in (0, 1], a share of the adapter's parameters, or a whole number of them, got {value!r}"
        )
    if isinstance(value, float):
        _real(name, value, "in (0, 1] where it is a float, a share of the parameters", lambda x: 0 < x <= 1)
    else:
        _whole(name, value, least=1)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{hint}")


def _whole(name: str, value: object, least: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number{' or None' if optional else ''}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _real(name: str, value: object, allowed: str, test: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
    if not math.isfinite(value) or not test(value):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names for a message, with an ellipsis where there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


_IN_BACKWARD = "updates the weights during the backward pass, before step() can prepare any gradient"
_REFUSED = {
    "cpuoffload": "works on copies of the weights and gradients on the host, which GRIT's changes of either never reach",
    "deepspeedcpu": "works on copies of the weights and gradients on the host, which GRIT's changes of either never reach",
    "layerwise": _IN_BACKWARD,
    "lomo": _IN_BACKWARD,
}
"""By a part of the class's name, in lower case: none of these packages need be there to know them."""


def check_base(base: object) -> None:
    """Refuse what cannot be a base optimizer.

    Raises:
        TypeError: ``base`` is no ``torch.optim.Optimizer``, or is one that evaluates the loss several times
            per step, acts during the backward pass, or works on copies of the weights.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"the first argument must be a torch.optim.Optimizer such as torch.optim.AdamW(model.parameters(), lr=2e-4), got "
            f"{type(base).__name__}"
        )
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates the loss several times per step, and curvature would be gathered from all of them; use a "
            "first-order base such as torch.optim.AdamW"
        )
    for kind in type(base).__mro__:
        reason = next((why for word, why in _REFUSED.items() if word in kind.__name__.lower()), None)
        if reason is not None:
            raise TypeError(
                f"{type(base).__name__} cannot be a base optimizer: it {reason}; use torch.optim.AdamW or the like"
            )
    if hasattr(base, "check_capture"):
        raise TypeError("the base optimizer is a GritOptimizer already; wrap the plain optimizer once")


def check_direction_momentum(momentum: float | str | None, base: Optimizer) -> None:
    """Refuse a ``direction_momentum`` for a base that keeps no average of the gradient, or one of a kind that is not known.

    Raises:
        ValueError: the base is neither a kind of Adam with β₁ > 0 nor SGD with momentum.
    """
    if momentum in (None, "base"):
        return
    known = is_adam(base) or "dampening" in base.defaults
    if not known or any(moment_decay(group) == 0 for group in base.param_groups):
        raise ValueError(
            f"direction_momentum={momentum!r} is for the average of the gradient that a base keeps, and {type(base).__name__} "
            "keeps none here, or one of another kind; leave it out, or wrap a kind of Adam with β₁ > 0, or SGD with momentum"
        )


def is_adam(base: Optimizer) -> bool:
    """Whether the base is some kind of Adam, by the names of its class and those that it inherits from."""
    return any("Adam" in kind.__name__ for kind in type(base).__mro__)


def moment_decay(settings: Mapping[str, Any]) -> float:
    """What the base's average of the gradient keeps per step, in a group of any kind of Adam or of SGD; 0 without one."""
    return float(settings["betas"][0] if "betas" in settings else settings.get("momentum", 0.0))


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are partitioned over processes.

    Raises:
        NotImplementedError: a parameter is a DTensor (FSDP2, tensor parallelism) or no matrix (FSDP1,
            ZeRO-3).
    """
    for name, parameter in parameters.items():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise NotImplementedError(
                f"site {name!r} holds a DTensor (FSDP2 or tensor parallelism): its rows lie on several processes, and "
                "GritOptimizer needs whole matrices; use DDP, or a single process"
            )
        if parameter.dim() < 2:
            raise NotImplementedError(
                f"the weight of site {name!r} is a flat vector of {parameter.numel()} entries: FSDP1 or ZeRO-3 has partitioned "
                "it over processes, and GritOptimizer needs whole matrices; use DDP, or a single process"
            )
