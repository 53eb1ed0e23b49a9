"""Every option of GritOptimizer, written down once: its name, default, check and meaning, grouped by subject.

The signature of GritOptimizer, its documentation and docs/options.md come from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from grit_optim.options.checks import (
    EFFECTIVE,
    Check,
    budget_of,
    device,
    flag,
    one_of,
    real,
    shares_of,
    whole,
    word,
)

PAIRINGS = ("kfac", "paper")
FISHERS = ("kfac", "diagonal", "block_diagonal", "ekfac")
DAMPINGS = ("relative", "absolute")
PAPER_PROJECTIONS = ("two_sided", "one_sided")
CAPTURES = ("auto", "taps", "gradients")
REPROJECTIONS = ("none", "balanced", *PAPER_PROJECTIONS)
BUDGET_SCHEDULES = ("linear", "cosine", "adaptive")
MODALITIES = ("vision", "audio", "cross_modal", "text")
TOKEN_KINDS = ("text", "vision", "audio")


def option(default: Any, check: Check, meaning: str) -> Any:
    """One option: a dataclass field that carries its check and its meaning."""
    return field(default=default, metadata={"check": check, "meaning": " ".join(meaning.split())})


@dataclass(frozen=True)
class Group:
    """Options of one subject, checked one by one."""

    def __post_init__(self) -> None:
        for known in fields(self):
            known.metadata["check"](known.name, getattr(self, known.name))


@dataclass(frozen=True)
class PreconditionOptions(Group):
    """How the curvature changes a step."""

    precondition: str = option(
        "spectral",
        word,  # the names stand in preconditioners/modes.py
        """How the curvature is used. "spectral": the base steps, and its step is turned to the direction of
        steepest descent in the spectral norm of Fisher coordinates: the momentum is whitened on its rank
        side, as Muon does to whole matrices. "steer": the base's step is turned to the natural gradient of
        its moment. "eigenbasis": the base works in the eigenbasis of each pair's factors, and keeps its
        moments there, as SOAP does for Adam. "balanced": the base works in the coordinates in which both
        factors are diagonal and equal, and keeps its moments there. "inverse": the gradient is multiplied by
        the damped inverse before the base sees it (the GRIT paper). "none": the base, bit for bit.""",
    )
    kfac_power: float | None = option(
        None,
        real("from 0 up", lambda x: x >= 0),
        """Power p of Σ⁻¹ in "spectral" and "steer": 1 is the natural gradient, 0 leaves the tokens' curvature
        out. None: 0.5 for "spectral", 1 for "steer".""",
    )
    direction_momentum: float | str | None = option(
        None,
        real("in [0, 1), or 'base'", lambda x: 0 <= x < 1, besides=("base",)),
        """What the average of the gradient keeps per step in "spectral" and "steer". The base's first moment
        of the pairs is made to forget so fast, where it lies; the base's own β₁, or SGD's momentum, counts
        for other parameters only. "base" leaves it alone. None: 0.6 for "spectral" around any Adam whose β₁
        is not 0 and that does not find its own rate, else "base".""",
    )
    step_length: float | str | None = option(
        None,
        real("above 0, 'base' for the base's own length, or 'natural'", lambda x: x > 0, ("base", "natural")),
        """How long the turned step is. In "spectral" and "steer": root mean square of its entries in units of
        the learning rate, or "base" for the length of the base's own step; under a rank_budget it grows by
        r₀/r where a pair keeps r of its first r₀ directions. "spectral" then adds the share of the base's
        step that it lacks to decrease the loss as much. In "inverse": "base" keeps the norm of each matrix's
        gradient, "natural" that of Σ⁻¹∇, as the GRIT library does. None: 0.6 for "spectral" around an Adam
        that is given its rate, else "base".""",
    )
    max_grad_norm: float | None = option(
        None,
        real("above 0, or None for no limit", lambda x: x > 0, besides=(None,)),
        """Upper bound on the joint norm of the pairs' gradients as the base gets them, after
        preconditioning.""",
    )


@dataclass(frozen=True)
class CurvatureOptions(Group):
    """What approximates the Fisher information."""

    fisher: str = option(
        "kfac",
        one_of(FISHERS),
        """What approximates the Fisher information. "kfac": the token factors Σ_a and Σ_g. "block_diagonal":
        E[∇A ∇Aᵀ] and E[∇Bᵀ ∇B], the r×r covariances of each matrix's own gradient. "diagonal": E[∇A²] and
        E[∇B²], entry by entry. "ekfac": the eigenbases of Σ_g and Σ_a, with E[(Qᵀ∇A)²] and E[(∇B Q)²] as
        eigenvalues. The last two keep as much state as one of Adam's moments.""",
    )
    pairing: str = option(
        "kfac",
        one_of(PAIRINGS),
        """"kfac" multiplies ∇A by Σ_g⁻¹ and ∇B by Σ_a⁻¹, which does not depend on the coordinates of A and B.
        "paper" is the other way round, as in the GRIT paper and library.""",
    )
    fisher_decay: float | None = option(
        0.9,
        real("in [0, 1), or None for the running mean", lambda x: 0 <= x < 1, besides=(None,)),
        """Weight in [0, 1) that the factors' past keeps per recorded step. None: the mean over all
        tokens.""",
    )
    modality_weights: str | Mapping[str, float] | None = option(
        None,
        shares_of(TOKEN_KINDS),
        """Shares of text, pictures ("vision") and sound ("audio") in the factors of a multimodal language
        model, as in {"text": 1, "vision": 1}; "equal" for equal shares. The factors of each kind of token are
        kept apart then. None: as they come, so that pictures, which have most tokens, decide. What a cut is
        predicted to cost counts tokens with these shares too.""",
    )
    kfac_min_samples: int = option(64, whole(0), """Tokens that a factor must have seen before it is used.""")
    kfac_damping: float | None = option(
        None,
        real("above 0", lambda x: x > 0),
        """λ added to the factors before they are inverted or balanced; raise it if steps are erratic at small
        batches. None: 0.3 for "spectral" and "steer", 0.03 for "inverse", 1e-4 for "balanced"; "eigenbasis"
        needs none.""",
    )
    damping: str = option(
        "relative",
        one_of(DAMPINGS),
        """Unit of λ. "relative": the factor's mean eigenvalue. "absolute": the loss's own unit, as in the
        GRIT library, where λ = 1e-3 is far above Σ_g and so leaves A's gradient as it is.""",
    )
    kfac_inversion_device: str | None = option(
        None,
        device,
        """Where factors are inverted or decomposed: "cpu", "cuda", or None for where they are.""",
    )


@dataclass(frozen=True)
class CaptureOptions(Group):
    """What is recorded of the forward and backward passes."""

    capture: str = option(
        "auto",
        one_of(CAPTURES),
        """Where the factors come from. "taps": from hooks on `lora_A`, which see each token's h and δ.
        "gradients": from the pairs' own gradients, ∇Bᵀ∇B and ∇A∇Aᵀ in the place of Σ_a and Σ_g, without any
        hook. "auto": from taps, and from gradients for the pairs that taps do not see, as under fused
        kernels.""",
    )
    cov_update_freq: int = option(1, whole(1), """The taps record the tokens of one step in so many.""")
    max_tokens: int | None = option(
        1024,
        whole(1, optional=True),
        """Tokens per pair and step that enter the factors, evenly spaced. None: all.""",
    )

    @property
    def taps_only(self) -> bool:
        """Whether pairs that no tap sees are left to the base."""
        return self.capture == "taps"


@dataclass(frozen=True)
class ScheduleOptions(Group):
    """When each part of the work is due."""

    kfac_update_freq: int | None = option(
        None,
        whole(1),
        """Steps between two refreshes of what is derived from the factors. None: 1 for "spectral", "steer"
        and "inverse", 2 for "eigenbasis", 10 for "balanced"; the last two move the base's moments at each
        refresh.""",
    )
    ng_warmup_steps: int = option(
        0, whole(0), """Steps at the start during which the curvature is gathered but not applied."""
    )
    reprojection_freq: int = option(50, whole(1), """Steps between two reprojections.""")
    reprojection_warmup_steps: int = option(0, whole(0), """Steps before the first reprojection.""")
    adaptive_schedule: bool = option(
        False,
        flag,
        """Lengthen the periods of refresh and reprojection to 1.5 times while the loss falls by over 1 % in
        ten steps, and shorten them to 0.75 times when it does not; let the damping follow the loss's noise,
        between ¼ and 4 times the given one. The loss is that of observe(), else the closure's, else that of
        the model's output.""",
    )


@dataclass(frozen=True)
class RankOptions(Group):
    """How many directions each pair keeps."""

    reprojection: str = option(
        "none",
        one_of(REPROJECTIONS),
        """"balanced" drops the coordinates that matter least in the K-FAC metric, for good. "two_sided" and
        "one_sided" project A and B onto leading eigenvectors of their factors (the GRIT paper). "none": A and
        B stay.""",
    )
    reprojection_k: int | None = option(
        None, whole(1, optional=True), """Directions kept while there is no rank adaptation. None: all."""
    )
    rank_adaptation_threshold: float | None = option(
        None,
        real("in (0, 1], or None for no rank adaptation", lambda x: 0 < x <= 1, besides=(None,)),
        """τ in (0, 1]: keep as many directions as hold this share of the energy, which is eigenvalues of Σ_a
        in the paper's projections and Λ² in balanced coordinates. 0.99 in the GRIT library. None: no rank
        adaptation.""",
    )
    min_lora_rank: int = option(
        4,
        whole(0),
        """Directions that rank adaptation always leaves. With a rank_budget it may be 0: a pair that is not
        worth a direction is then left out of the saved adapter.""",
    )
    rank_adaptation_start_step: int = option(0, whole(0), """Steps before the first adaptation.""")
    rank_budget: float | tuple[float, float] | Mapping[str, Any] | str | None = option(
        None,
        budget_of(MODALITIES),
        """Parameters that all pairs together may keep: a float is a share of what the adapter has, an
        int a number of them. All directions of all pairs compete by the rise of the loss that dropping
        them is predicted to cost, per parameter. A pair (start, end) comes from the start to the end; a
        budget that rises gives directions back, started as LoRA starts (A random, B zero). A mapping gives
        parts of a multimodal model budgets of their own, as in {"vision": 0.5, "text": (1.0, 0.6)}: pairs
        compete within their part, and parts that it leaves out keep all. "effective" sizes itself: see
        effective_rank_factor. Needs reprojection="balanced".""",
    )
    effective_rank_factor: float = option(
        1.2,
        real("above 0", lambda x: x > 0),
        """With rank_budget="effective" each pair comes to this many times the effective rank of its Σ_a,
        rounded up, as it is at the first reprojection from rank_adaptation_start_step on. The rule of
        GRIT-VLM.""",
    )
    rank_budget_schedule: str = option(
        "linear",
        one_of(BUDGET_SCHEDULES),
        """How the budget comes to its end: "linear", "cosine", or "adaptive": linear, but standing still
        while the mean loss since the last cut is more than 1 % above the lowest so far.""",
    )
    rank_budget_steps: int = option(
        0,
        whole(0),
        """Steps from the start to the end of the budget, counted from rank_adaptation_start_step; 0: at once.
        The budget takes effect at reprojections.""",
    )

    @property
    def moves(self) -> bool:
        """Whether the pairs change coordinates in training."""
        return self.reprojection != "none"

    @property
    def gives_up(self) -> bool:
        """Whether a dropped direction is given up for good, as it is not in the paper's projections."""
        return self.reprojection not in PAPER_PROJECTIONS

    @property
    def adapts(self) -> bool:
        """Whether ranks change in training."""
        return self.rank_budget is not None or self.rank_adaptation_threshold is not None

    @property
    def sizes_itself(self) -> bool:
        """Whether the pairs' own effective ranks are the budget."""
        return self.rank_budget == EFFECTIVE

    @property
    def budgets(self) -> dict[str, tuple[float, float]]:
        """Start and end of each part's budget, "" for all pairs; by default it starts at the whole part."""
        if self.rank_budget is None or isinstance(self.rank_budget, str):
            return {}
        given: Any = self.rank_budget if isinstance(self.rank_budget, Mapping) else {"": self.rank_budget}
        return {
            part: (own[0], own[1]) if isinstance(own, tuple | list) else (1.0, own)
            for part, own in given.items()
        }

    @property
    def has_start(self) -> bool:
        """Whether a budget comes from a start of its own."""
        given = self.rank_budget.values() if isinstance(self.rank_budget, Mapping) else [self.rank_budget]
        return any(isinstance(own, tuple | list) for own in given)

    @property
    def reported_threshold(self) -> float:
        """τ of the effective ranks in reports, 0.99 where nothing is adapted by it."""
        return 0.99 if self.rank_adaptation_threshold is None else self.rank_adaptation_threshold


@dataclass(frozen=True)
class PenaltyOptions(Group):
    """Penalties on a pair that come from its curvature."""

    lambda_kfac: float = option(
        0.0,
        real("from 0 up", lambda x: x >= 0),
        """λ_K of the penalty λ_K (tr(Aᵀ Σ_a A) + tr(B Σ_g Bᵀ)) on directions of high curvature, in units of
        damping; 1e-5 in the paper. Its gradient, and that of lambda_reproj, is added after the preconditioner
        and before max_grad_norm.""",
    )
    lambda_reproj: float = option(
        0.0,
        real("from 0 up", lambda x: x >= 0),
        """λ_R of the penalty λ_R (‖(I − P_a) A‖² + ‖B (I − P_g)‖²) on what a reprojection would drop; 1e-4 in
        the paper. Needs reprojection_k or rank_adaptation_threshold.""",
    )
    regularizer_warmup_steps: int = option(
        0, whole(0), """Steps over which both penalties grow from nothing on a straight line."""
    )

    @property
    def any(self) -> bool:
        """Whether there is a penalty."""
        return self.lambda_kfac > 0 or self.lambda_reproj > 0
