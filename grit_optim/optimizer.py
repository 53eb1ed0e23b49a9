"""GritOptimizer: wraps any torch optimizer and teaches it the curvature of the LoRA adapters that it trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from grit_optim import schedules as schedule
from grit_optim.capture import processes
from grit_optim.curvature import checkpoint
from grit_optim.curvature.bucket import Curvature
from grit_optim.lora.discovery import Site
from grit_optim.options import OPTION_NAMES, Options, check_base, check_direction_momentum
from grit_optim.pace import Pace
from grit_optim.preconditioners import modes
from grit_optim.presets import with_mode_defaults
from grit_optim.rank.budget import Origin
from grit_optim.telemetry.reporting import ReportingOptimizer


class GritOptimizer(ReportingOptimizer):
    """A base optimizer that sees the rank-space Fisher information of the LoRA pairs it trains.

    Each :meth:`step`

    1. reads what the taps gathered since the last step and folds it into the factors Σ_a and Σ_g;
    2. every ``kfac_update_freq`` steps derives from them what it applies;
    3. prepares the gradients (or coordinates) of every pair, then adds those of the penalties;
    4. lets the base optimizer step, and turns that step back ("eigenbasis") or aside ("spectral", "steer");
    5. every ``reprojection_freq`` steps reprojects the pairs, moves the base's moments along and adapts the
       rank;
    6. counts, and records for whoever listens (:meth:`log_to`), without waiting for the device.

    Where several processes train together (DDP), the first stage adds the sums of all of them up, so every
    process has to call :meth:`step`, and whatever else changes the model (``reduce_ranks_``, ``shrink_``).

    Parameters that belong to no LoRA pair go to the base untouched. Learning rate, weight decay and all else
    are the base's: ``param_groups``, ``state`` and ``defaults`` are its own.

    Args:
        base: any ``torch.optim.Optimizer`` except LBFGS, already built on the model's trainable parameters.
        model: the PEFT model (or one that contains such layers), used to find the pairs; a weak reference is
            kept. A pair that the base holds but that is frozen (another adapter, a layer to be unfrozen
            later) is tapped once it is trained.
        sites: the pairs, instead of looking for PEFT's: hand-written LoRA is passed as
            ``[Site.from_modules(name, a, b, scaling), …]``.
        precondition: how the curvature is used.
            ``"spectral"``: the base steps, and its step is turned to the direction of steepest descent in the
            spectral norm of Fisher coordinates: momentum whitened on the rank side, as Muon does to whole
            matrices. ``"eigenbasis"``: the base works in the eigenbasis of each pair's factors; its moments
            are kept in that basis. ``"steer"``: the base's step is turned to the direction of the natural
            gradient of its moment. ``"balanced"``: the pairs are kept in coordinates in which both factors
            are diagonal and proportional. ``"inverse"``: the gradient is multiplied by the damped inverse
            before the base sees it (the GRIT paper). ``"none"``: exactly the base.
        fisher: what approximates the Fisher information. ``"kfac"``: the token factors Σ_a and Σ_g.
            ``"block_diagonal"``: E[∇A ∇Aᵀ] and E[∇Bᵀ ∇B], the r×r covariances of each matrix's own gradient.
            ``"diagonal"``: E[∇A²] and E[∇B²], entry by entry. ``"ekfac"``: the eigenbases of Σ_g and Σ_a,
            with E[(Qᵀ∇A)²] and E[(∇B Q)²] as eigenvalues. The last two keep as much state as one of Adam's
            moments.
        pairing: ``"kfac"`` multiplies ∇A by Σ_g⁻¹ and ∇B by Σ_a⁻¹; ``"paper"`` the other way round.
        fisher_decay: weight in [0, 1) that the factors' past keeps per recorded step; None for the mean over
            all tokens.
        kfac_update_freq: steps between two refreshes of what is derived from the factors. None: 1 for
            "spectral", "steer" and "inverse", 2 for "eigenbasis", 10 for "balanced"; the last two move the
            base's moments at each refresh.
        kfac_min_samples: tokens that a factor must have seen before it is used.
        kfac_damping: λ added to the factors before they are inverted or balanced. None: 0.3 for "spectral"
            and "steer", 0.03 for "inverse", 1e-4 for "balanced"; "eigenbasis" needs none.
        damping: ``"relative"``: λ is in units of the factor's mean eigenvalue; ``"absolute"``: in the loss's
            own units, as in the GRIT library, whose λ so depends on batch size and loss scale.
        kfac_power: power p of Σ⁻¹ in "spectral" and "steer": 1 is the natural gradient, 0 leaves the tokens'
            curvature out.
            None: 0.5 for "spectral", 1 for "steer".
        direction_momentum: what the average of the gradient keeps per step in "spectral" and "steer", whose
            direction wants to be fresher than Adam's: the base's first moment of the pairs is made to forget
            so fast, and its own β₁ (SGD's momentum) counts for other parameters only. ``"base"`` leaves it
            alone. None: 0.6 for "spectral" around any kind of Adam whose β₁ is not 0 and that does not find
            its own rate, else "base".
        gradient_share: share of the newest gradient in the direction of "spectral" and "steer", beside that
            average; 0.4 at a momentum of 0.6 is Nesterov's. None: 0.4 for "spectral", 0 for "steer".
        caution: share in [0, 1] that entries of the direction lose where they go up the newest gradient, in
            "spectral" and "steer"; 0 leaves them as they are, 1 drops them. None: 0.7 for "spectral", 0 for
            "steer".
        step_length: how long a step of "spectral" or "steer" is: root mean square of its entries, in units of
            the learning rate, or ``"base"`` for the length of the step that the base took. None: 0.6 in
            "spectral" around any kind of Adam, else "base". With a ``rank_budget`` it grows by r₀/r where a
            pair has r of r₀ directions left, so that the step's singular values add up to what they did.
        a_step_ratio: how much longer A's steps are than B's, in "spectral" and "steer". None: 1.5 for
            "spectral", 1 for "steer".
        kfac_inversion_device: where factors are inverted or decomposed; None for where they are.
        cov_update_freq: the taps record in one step of so many.
        max_tokens: tokens per pair and step that enter the factors, evenly spaced; None for all.
        ng_warmup_steps: steps at the start during which the curvature is gathered but not applied.
        preserve_norm: "inverse" keeps the Frobenius norm of each matrix's gradient, so that the learning rate
            and a trainer's clipping keep their meaning.
        max_grad_norm: upper bound on the joint norm of the pairs' gradients as the base gets them; None for
            no bound.
        reprojection: ``"balanced"``: drops the coordinates that matter least in the K-FAC metric, for good;
            ``"two_sided"``, ``"one_sided"``: project A and B onto leading eigenvectors of their factors (the
            GRIT paper); ``"none"``.
        reprojection_freq: steps between two reprojections.
        reprojection_k: directions kept while there is no rank adaptation; None keeps all.
        reprojection_warmup_steps: steps before the first reprojection.
        enable_rank_adaptation: keep as many directions as hold the share ``rank_adaptation_threshold`` of the
            energy: eigenvalues of Σ_a in the paper's projections, Λ² in balanced coordinates.
        rank_adaptation_threshold: τ in (0, 1].
        min_lora_rank: directions that rank adaptation always leaves. With a ``rank_budget`` it may be 0:
            sites that are not worth a direction are then left out of the exported adapter.
        rank_adaptation_start_step: steps before the first adaptation.
        rank_budget: parameters that all pairs together may keep: a float is a share of what the adapter has,
            an int a number of them. All directions of all sites compete by the rise of the loss that dropping
            them is predicted to cost, per parameter. Needs ``reprojection="balanced"``; takes the place of
            ``enable_rank_adaptation``.
        rank_budget_start: budget from which ``rank_budget`` is approached; None for the whole adapter. A
            start below the end, as in GRIT-VLM's ``projection_budget_start=32, projection_budget_end=96``,
            needs ``rank_regrowth``.
        rank_budget_schedule: ``"linear"``, ``"cosine"``, or ``"adaptive"``: linear, but standing still while
            the loss suffers, which is known as for ``adaptive_schedule``.
        rank_budget_steps: steps from the start to the end of the budget, counted from
            ``rank_adaptation_start_step``; 0 goes to the end at once. The budget takes effect at
            reprojections.
        rank_budget_tolerance: how much the mean loss since the last cut may exceed the lowest mean so far, as
            a share, before "adaptive" stands still.
        rank_regrowth: give directions that were given up back to sites whose spectrum is still flat at its
            end. They start as LoRA does, A random and B zero.
        lambda_kfac: λ_K of the penalty λ_K (tr(Aᵀ Σ_a A) + tr(B Σ_g Bᵀ)) on directions of high curvature, in
            the units of ``damping``. Its gradient, and the next one's, is added after the preconditioner and
            before ``max_grad_norm``; "spectral" and "steer" turn the base's step as a whole, and it with the
            rest. 0: none.
        lambda_reproj: λ_R of the penalty λ_R (‖(I − P_a) A‖² + ‖B (I − P_g)‖²) on what lies outside the
            leading directions of Σ_a and Σ_g, as many as a reprojection would keep. 0: none.
        regularizer_warmup_steps: steps over which both penalties grow from nothing on a straight line.
        adaptive_schedule: lengthen the periods of refresh and reprojection while the loss falls, shorten them
            when it stalls, and let the damping follow the loss's noise (``pace.py`` has the rule and its
            bounds). The loss is what :meth:`observe` was given, else the closure's, else that of the model's
            output.

    Raises:
        TypeError: ``base`` is no optimizer, or cannot be wrapped, or an option has the wrong type.
        ValueError: an option is out of range, or no LoRA pair is found.

    Example:
        >>> optimizer = GritOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-4), model)  # doctest: +SKIP
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        *,
        sites: Sequence[Site] | None = None,
        precondition: str = "spectral",
        pairing: str = "kfac",
        fisher: str = "kfac",
        fisher_decay: float | None = 0.9,
        kfac_update_freq: int | None = None,
        kfac_min_samples: int = 64,
        kfac_damping: float | None = None,
        damping: str = "relative",
        kfac_power: float | None = None,
        direction_momentum: float | str | None = None,
        gradient_share: float | None = None,
        caution: float | None = None,
        step_length: float | str | None = None,
        a_step_ratio: float | None = None,
        kfac_inversion_device: str | None = None,
        cov_update_freq: int = 1,
        max_tokens: int | None = 1024,
        ng_warmup_steps: int = 0,
        preserve_norm: bool = True,
        max_grad_norm: float | None = None,
        reprojection: str = "none",
        reprojection_freq: int = 50,
        reprojection_k: int | None = None,
        reprojection_warmup_steps: int = 0,
        enable_rank_adaptation: bool = False,
        rank_adaptation_threshold: float = 0.99,
        min_lora_rank: int = 4,
        rank_adaptation_start_step: int = 0,
        rank_budget: float | None = None,
        rank_budget_start: float | None = None,
        rank_budget_schedule: str = "linear",
        rank_budget_steps: int = 0,
        rank_budget_tolerance: float = 0.01,
        rank_regrowth: bool = False,
        lambda_kfac: float = 0.0,
        lambda_reproj: float = 0.0,
        regularizer_warmup_steps: int = 0,
        adaptive_schedule: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in OPTION_NAMES}
        check_base(base)
        self.options = Options(**with_mode_defaults(given, base))
        check_direction_momentum(direction_momentum, base)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the second argument must be the model (a torch.nn.Module), got {type(model).__name__}"
            )
        self._model = weakref.ref(model)
        self._given_sites = sites is not None
        self._frozen = []
        self._start(base, list(sites) if sites is not None else self._find_sites(base, model))
        self._warn_of_ranks_that_stay()

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, with curvature.

        Args:
            closure: runs zero_grad, forward and backward and returns the loss; run once, with gradients
                enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            NotImplementedError: a pair's weights are partitioned over processes.
            RuntimeError: the optimizer was closed.
        """
        if self._closed:
            raise RuntimeError(
                "this GritOptimizer was closed; go on with its base optimizer, or build a new one"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        observed = self._losses.take(loss)
        if processes.size() > 1 and self._needs_losses() and self._curvatures:
            observed = processes.mean_loss(observed, self._curvatures[0].bucket.device)
        self._tell_budget(observed)
        self._follow_model()
        advancing = self._fold_statistics()
        self._tap_unfrozen()
        if advancing:
            self._refresh()
        self._step_base()
        if advancing:
            self._reproject()
            self._count(observed)
            self._record(observed)
        return loss

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """End the logging, remove every hook, bring the base's state back to the coordinates of A and B: it can go on alone."""
        if self._closed:
            return
        self.finish_logging()
        for curvature in self._curvatures:
            self._mode.to_plain_coordinates(curvature)
        self._losses.detach()
        self._capture.close()
        self._closed = True

    def __repr__(self) -> str:
        return f"GritOptimizer(precondition={self.options.precondition!r}, sites={len(self._sites)}, base={self.base!r})"

    # ---------------------------------------------------------------- copying, saving, loading

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what the taps gathered with them."""
        super().zero_grad(set_to_none)
        self._capture.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the base another parameter group; LoRA pairs that it completes are tapped from now on."""
        super().add_param_group(param_group)
        self._tap_what_is_trained()

    def _own_state(self) -> dict[str, Any]:
        with_operators = (
            self.options.kfac_update_freq > 1
            or self.options.adaptive_schedule
            or self.options.precondition == "eigenbasis"
            or self.options.fisher == "ekfac"  # its moments are expressed in the eigenbases
        )
        return {
            "version": checkpoint.VERSION,
            "steps": self._steps,
            "calls_per_step": self._capture.calls_per_step,
            "offset": self._capture.offset,
            "precondition": self.options.precondition,
            "fisher": self.options.fisher,
            "reprojection": self.options.reprojection,
            "refreshes": self._counters.refreshes,
            "reprojections": self._counters.reprojections,
            "pace": self._pace.pack(),
            "sites": checkpoint.pack_sites(self._curvatures, with_operators),
            "origin": {name: list(origin) for name, origin in self._origin.items()},
            "removed": dict(self._removed),
            "budget": {} if self._budget is None else self._budget.state(),
        }

    def _check_own_state(self, own: dict[str, Any]) -> None:
        self._tap_named(own["sites"].keys())
        checkpoint.check(own, self._curvatures)

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        self._capture.discard()
        self._curvatures = [Curvature(c.bucket, self.options) for c in self._curvatures]
        own = own or {"sites": {}}
        self._steps = own.get("steps", 0)
        self._capture.calls_per_step, self._capture.offset = (
            own.get("calls_per_step", 1),
            own.get("offset", 0),
        )
        self._capture.active = schedule.capture_due(self._steps, self.options.cov_update_freq)
        self._counters.refreshes = own.get("refreshes", 0)
        self._counters.reprojections = own.get("reprojections", 0)
        self._pace = Pace(self.options)
        self._pace.unpack(own.get("pace", {}))
        checkpoint.unpack_sites(self._curvatures, own["sites"])
        self._load_ranks(own)
        if own.get("precondition") == "eigenbasis" and self.options.precondition != "eigenbasis":
            for curvature in self._curvatures:  # the moments were saved as seen from the eigenbasis
                modes.Eigenbasis(self.base).to_plain_coordinates(curvature)
        kept = own.get("precondition"), own.get("fisher", "kfac")
        if own["sites"] and kept != (self.options.precondition, self.options.fisher):
            for curvature in self._curvatures:  # operators of another kind; the next refresh derives our own
                curvature.drop_operators(same_fisher=kept[1] == self.options.fisher)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "options": self.options,
            "base": self.base,
            "sites": self._sites,
            "given_sites": self._given_sites,
            "grit": self._own_state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options = state["options"]
        self._given_sites = state["given_sites"]
        self._frozen = []
        self._model = None  # the copy knows its sites; the model they came from is not copied along
        origin = {name: Origin(*values) for name, values in state["grit"].get("origin", {}).items()}
        self._start(state["base"], state["sites"], origin)
        self._load_own_state(state["grit"])
