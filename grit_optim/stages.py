"""What happens in a step of GritOptimizer, stage by stage; the public face is in ``optimizer.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim import schedules as schedule
from grit_optim.base.wrapper import OptimizerWrapper
from grit_optim.capture import diagnosis, processes
from grit_optim.capture.taps import Capture
from grit_optim.curvature import checkpoint
from grit_optim.curvature.bucket import Curvature
from grit_optim.curvature.factors import Sums, gradient_unit, loss_tokens
from grit_optim.curvature.moments import mean_square
from grit_optim.lora.buckets import build_buckets, check_distinct
from grit_optim.lora.discovery import Site
from grit_optim.messages import warn
from grit_optim.options import Options, check_parameters, listed
from grit_optim.pace import Pace
from grit_optim.preconditioners import modes
from grit_optim.preconditioners import penalties as regularizers
from grit_optim.preconditioners.held import Held, clip, give_back, hand_over, hold_gradients, norm
from grit_optim.presets import BALANCING_DAMPING
from grit_optim.rank import budget, pairs
from grit_optim.rank.budget import BudgetSchedule, Origin
from grit_optim.rank.coordinates import Coordinates
from grit_optim.rank.selection import Bids, RankPolicy, ranks_within
from grit_optim.telemetry.counters import Counters, Outcome, StageTimes


class StagedOptimizer(OptimizerWrapper):
    """An optimizer's sites, taps and curvature, and the stages that one step is made of."""

    options: Options
    state_key = checkpoint.KEY

    def _start(self, base: Optimizer, sites: list[Site], origin: dict[str, Origin] | None = None) -> None:
        """Everything that construction, unpickling and copying have in common."""
        self._wrap(base)
        self._mode = modes.make_preconditioner(self.options.precondition, base)
        self._times = StageTimes()
        self._counters = Counters()
        self._pace = Pace(self.options)
        self._steps = 0
        self._tap_watch = diagnosis.TapWatch()
        self._closed = False
        # Whether coordinates may have been given up; whether they have, the device alone knows.
        self._reduced = False
        self._versions: list[int] | None = None
        self._curvatures: list[Curvature] = []
        self._capture = Capture([], [], None, self._times)
        self._removed: dict[str, float] = {}
        self._origin: dict[str, Origin] = {}
        self._budget: BudgetSchedule | None = None
        self._remember(sites, origin or {})
        self._attach(sites)

    def _remember(self, sites: list[Site], origin: Mapping[str, Origin]) -> None:
        """Note what the sites were at first, and size the budget by it."""
        self._origin = {**{site.name: Origin(site.rank, site.parameters) for site in sites}, **origin}
        before = self._budget.state() if self._budget is not None else {}
        self._budget = budget.make_schedule(self.options, self._origin.values())
        if self._budget is not None:
            self._budget.load(before)
        self._note_first_ranks()

    def _note_first_ranks(self) -> None:
        """Tell the curvatures what rank their sites had at first."""
        for curvature in self._curvatures:
            ranks = [self._origin[name].rank for name in curvature.bucket.names()]
            curvature.first_rank = torch.tensor(ranks, device=curvature.bucket.device)

    def _attach(self, sites: list[Site], known: dict[str, checkpoint.SiteState] | None = None) -> None:
        """Stack and tap the sites; what is ``known`` of a site of the same name and rank, by default what is now, is kept."""
        if known is None:
            known = checkpoint.pack_sites(self._curvatures, with_operators=True)
        group_of = {id(p): i for i, group in enumerate(self.base.param_groups) for p in group["params"]}
        check_distinct(sites)
        check_parameters({site.name: site.a for site in sites})
        strangers = [site.name for site in sites if id(site.a) not in group_of or id(site.b) not in group_of]
        if strangers:
            raise ValueError(
                f"site(s) {listed(strangers)} have weights that the base optimizer does not hold; build it on the "
                "model's trainable parameters"
            )
        self._capture.close()
        self._versions = None
        buckets = build_buckets(sites, group_of)
        self._sites = sites
        self._weights = [(site.a, site.b, site.a.device) for site in sites]
        self._curvatures = [Curvature(bucket, self.options) for bucket in buckets]
        self._note_first_ranks()
        self._counters.outcomes = []  # these name places in the old buckets
        self._capture = Capture(sites, buckets, self.options.max_tokens, self._times)
        checkpoint.unpack_sites(self._curvatures, known)

    def _follow_model(self) -> None:
        """Notice parameters that were moved to another device or replaced (PEFT's ``update_layer``) since the last step."""
        same = [site.holds(a, b) for site, (a, b, _) in zip(self._sites, self._weights, strict=True)]
        moved = any(a.device != device for a, _, device in self._weights)
        if any(a.dim() < 2 for a, _, _ in self._weights):
            check_parameters({site.name: site.a for site in self._sites})
        if all(same) and not moved:
            if self._versions not in (
                None,
                self._weight_versions(),
            ):  # somebody has loaded weights since the last step
                pairs.settle_ranks(self._curvatures)
            return
        replaced = [site.name for site, is_same in zip(self._sites, same, strict=True) if not is_same]
        if replaced:
            warn(
                f"the weights of {len(replaced)} LoRA site(s) ({listed(replaced)}) were replaced or deleted after the "
                "optimizer was built, and the base optimizer does not hold the new ones, so they are not trained; build a "
                "new optimizer after changing adapters",
            )
        self._attach([site for site, is_same in zip(self._sites, same, strict=True) if is_same])

    def check_capture(self) -> list[diagnosis.SiteReport]:
        """Whether the taps see what the gradients saw, per site; call it after ``backward()`` and before :meth:`step`.

        Compares ⟨A, ∇A⟩, ⟨B, ∇B⟩ and Σ h·δ, which are equal up to the loss scale and the trainer's clipping.
        Reads values from the device. Runs by itself in the first steps, and warns. Where several processes
        train together, a process knows its own tokens alone, and the amounts are compared in the first steps
        only.
        """
        capture = self._capture
        return diagnosis.inspect(
            capture.sites, capture.seen(), capture.rounding, compare=processes.size() == 1
        )

    def _fold_statistics(self) -> bool:
        """Stage 1. Returns whether a tap fired since the last step: without that nothing of GRIT's advances."""
        with self._times("fold"):
            sums = self._own_sums() if processes.size() == 1 else self._sums_of_all()
            if sums is None:
                return False
            if not self._capture.active:
                return True
            device = self._curvatures[0].bucket.device
            accept = torch.stack([s.is_finite().to(device) for s in sums]).all()
            relative = self.options.damping == "relative"
            in_use = [curvature.mask.sum(-1) for curvature in self._curvatures]
            unit = gradient_unit(sums, in_use) if relative else torch.ones((), device=device)
            moment_unit, scored = self._moment_unit(device), loss_tokens(sums)
            if moment_unit is not None:
                accept = accept & moment_unit.isfinite()
            for curvature, total in zip(self._curvatures, sums, strict=True):
                there = curvature.bucket.device
                square_unit = moment_unit if moment_unit is None else moment_unit.to(there)
                curvature.fold(total, accept.to(there), unit.to(there), scored.to(there), square_unit)
            self._counters.folds += 1
            self._counters.dropped = self._counters.dropped + (~accept).long()
        return True

    def _own_sums(self) -> list[Sums] | None:
        """What the taps saw since the last step, one entry per bucket; None if none fired."""
        self._tap_watch.look(self.check_capture)
        if not any(self._capture.fired):
            self._capture.discard()
            return None
        return self._capture.collect()

    def _sums_of_all(self) -> list[Sums] | None:
        """The same of all processes together; None if no tap fired in any of them."""
        capture = self._capture
        if not capture.sites:
            return None
        fired, rounding = list(capture.fired), capture.rounding
        inner = [capture.inner(i) if self._tap_watch.steps_left else None for i in range(len(fired))]
        together = processes.add_up(capture.collect(), fired, inner)

        def reports() -> list[diagnosis.SiteReport]:
            """What the check of the taps finds over all tokens."""
            columns = (t.tolist() for t in (together.fired, together.inner, together.known))
            seen = [(int(n), value if known else None) for n, value, known in zip(*columns, strict=True)]
            return diagnosis.inspect(capture.sites, seen, rounding)

        self._tap_watch.look(reports)
        # A process that has seen something need not wait for the device to know that one has.
        return together.sums if any(fired) or together.fired.any() else None

    def _moment_unit(self, device: torch.device) -> Tensor | None:
        """What one unit of a squared gradient is to be in this step, not finite if a gradient is not; None without moments."""
        if self.options.fisher == "kfac":
            return None
        groups = [
            part for c in self._curvatures for group in c.bucket.groups if (part := group.with_gradient())
        ]
        return mean_square(groups, device, relative=self.options.damping == "relative")

    def _weight_versions(self) -> list[int]:
        return [a._version for a, _, _ in self._weights]

    def _in_use(self) -> bool:
        return self._steps >= self.options.ng_warmup_steps

    def _refresh(self) -> None:
        """Stage 2."""
        if not self._pace.refresh_due(self._steps):
            return
        turning = self._in_use() or not self._mode.changes_coordinates
        if not (turning or self._penalised):
            return
        with self._times("refresh"):
            for curvature in self._curvatures:
                curvature.damping_scale = self._pace.damping_scale
                if turning:
                    self._mode.refresh(curvature)
                self._refresh_penalties(curvature)
        self._counters.refreshes += 1

    @property
    def _penalised(self) -> bool:
        return self.options.lambda_kfac > 0 or self.options.lambda_reproj > 0

    def _refresh_penalties(self, curvature: Curvature) -> None:
        if self._penalised:
            regularizers.refresh(curvature, self._rank_policy())

    def _step_base(self) -> None:
        """Stages 3 and 4."""
        mode = self._mode if self._in_use() else modes.Identity(self.base)
        penalty = (
            schedule.ramp(self._steps, self.options.regularizer_warmup_steps) if self._penalised else 0.0
        )
        # The mode that is to come decides: its guard against gradients that are not finite holds in the
        # warm-up too.
        needed = self._mode.holds_gradients or self.options.max_grad_norm is not None or penalty > 0
        with self._times("precondition"):
            held = hold_gradients(self._curvatures) if needed else []
        try:
            with self._times("precondition"):
                for h in held:
                    h.gradient_norm = norm(h.gradient)
                    extra = regularizers.gradient(h.curvature, h.group, penalty) if penalty else None
                    mode.before(h)
                    if extra is not None:  # after the preconditioner, which so never sees it
                        ascends = self.base.param_groups[h.group.param_group].get("maximize", False)
                        h.gradient = h.gradient + mode.as_the_base_sees(h, -extra if ascends else extra)
                if self.options.max_grad_norm is not None:
                    clip(held, self.options.max_grad_norm)
                hand_over(held)
            with self._times("base"):
                self.base.step()
            with self._times("precondition"):
                for h in held:
                    mode.after(h)
        except BaseException:
            for h in held:
                mode.abandon(h)
            raise
        finally:
            give_back(held)
        if self._reduced:
            with self._times("reproject"):
                for curvature in self._curvatures:
                    pairs.clear_given_up(curvature)
        buckets = {id(curvature): i for i, curvature in enumerate(self._curvatures)}
        self._counters.outcomes = [_outcome(h, buckets[id(h.curvature)]) for h in held]

    def _reproject(self) -> None:
        """Stage 5."""
        options = self.options
        if options.reprojection == "none" or not self._pace.reprojection_due(self._steps):
            return
        with self._times("reproject"):
            for curvature in self._curvatures:
                self._mode.to_plain_coordinates(curvature)
            if options.reprojection == "balanced":
                self._balance()
            else:
                for curvature in self._curvatures:
                    pairs.project(self.base, curvature, self._rank_policy())
        self._counters.reprojections += 1

    def _rank_policy(self) -> RankPolicy:
        options = self.options
        adapting = options.enable_rank_adaptation and self._steps >= options.rank_adaptation_start_step
        threshold = options.rank_adaptation_threshold if adapting else None
        return RankPolicy(options.reprojection_k, threshold, options.min_lora_rank, options.rank_regrowth)

    def _balance(self) -> None:
        """Take balanced coordinates everywhere, with the ranks that the budget or each site's own spectrum leaves."""
        pairs.settle_ranks(self._curvatures)
        found = [pairs.coordinates(curvature, BALANCING_DAMPING) for curvature in self._curvatures]
        if self._budget is not None and self._steps >= self._budget.first:
            ranks = self._ranks_within(found, self._budget.advance(self._steps), self.options.rank_regrowth)
        else:
            policy = self._rank_policy()
            ranks = [
                policy.next_rank(f.energy, c.rank, f.usable)
                for f, c in zip(found, self._curvatures, strict=True)
            ]
        self._truncate(found, ranks)

    def _ranks_within(self, found: Sequence[Coordinates], parameters: Tensor, regrowth: bool) -> list[Tensor]:
        """The ranks of all sites within a common budget, one ``[S]`` per bucket."""
        bids = [
            Bids(c.factors.price[:, None] * f.energy, c.bucket.direction_size, c.rank, f.usable)
            for f, c in zip(found, self._curvatures, strict=True)
        ]
        return ranks_within(bids, parameters, self.options.min_lora_rank, regrowth)

    def _truncate(self, found: Sequence[Coordinates], ranks: Sequence[Tensor]) -> None:
        """Take the coordinates found, with the ranks given, and derive anew what belonged to the old ones."""
        for i, (curvature, coordinates, rank) in enumerate(zip(self._curvatures, found, ranks, strict=True)):
            pairs.truncate(self.base, curvature, coordinates, rank)
            if self.options.rank_regrowth:
                pairs.regrow(self.base, curvature, rank, seed=self._steps * len(self._curvatures) + i)
            if self._in_use():
                self._mode.refresh(curvature)
            self._refresh_penalties(curvature)
        policy = self._rank_policy()
        self._reduced = (
            self._reduced or self._budget is not None or (policy.fixed or policy.threshold) is not None
        )

    def _count(self, loss: Tensor | float | None) -> None:
        """The first half of stage 6."""
        self._steps += 1
        self._pace.take(loss)
        self._versions = self._weight_versions() if self._reduced else None
        self._capture.active = schedule.capture_due(self._steps, self.options.cov_update_freq)


def _outcome(held: Held, bucket: int) -> Outcome:
    """What is kept of a group's step until the next one, a number per matrix."""
    flat = [
        t if t is None else t.flatten() for t in (held.gradient_norm, held.without, held.turned, held.cosine)
    ]
    assert flat[0] is not None
    return Outcome(bucket, held.group.side, held.group.positions, flat[0], *flat[1:])
