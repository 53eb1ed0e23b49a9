"""The parts of a GritOptimizer: they work on the same LoRA pairs, and a checkpoint keeps their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.capture.capture import Capture
from grit_optim.capture.losses import Losses
from grit_optim.checkpoints.by_parameter import collected, names_of_state, spread
from grit_optim.checkpoints.checks import KEY, VERSION, check_state, names_of_sites
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.curvature.curvature import Curvature
from grit_optim.integrity.undo import Undo
from grit_optim.linalg import full_precision
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.discovery import largest_adapter
from grit_optim.lora.site import Site
from grit_optim.lora.site_set import SiteSet
from grit_optim.options import Options
from grit_optim.preconditioners.preconditioning import Preconditioning
from grit_optim.processes.group import AUTO, Processes
from grit_optim.profiling import StageTimes
from grit_optim.rank.adaptation import Ranks
from grit_optim.rank.origin import Origin
from grit_optim.rank.plan import Plan
from grit_optim.schedules import Schedule

__all__ = ["KEY", "Parts", "SiteState"]

SiteState = dict[str, Tensor]


class Parts:
    """What an optimizer is made of.

    The state is plain containers and tensors, keyed by site name. What the factors give at the next step is
    left out; operators are saved where the factors have moved on since, or moments are expressed in them.

    Args:
        base: the optimizer that holds the parameters.
        options: of all parts.
        sites: the LoRA pairs.
        process_group: the processes that train together, as the user says.

    Attributes:
        base: the optimizer that holds the parameters.
        options: of all parts.
        times: seconds spent in each stage.
        losses: the loss of each step.
        schedule: how many steps are done, and what is due.
        sites: the LoRA pairs.
        processes: those that train the pairs together.
        capture: what the passes of a step show.
        curvature: the Fisher information.
        ranks: directions kept, and given up.
        preconditioning: what the curvature does to a step.
    """

    def __init__(self, base: Optimizer, options: Options, sites: SiteSet, process_group: Any = AUTO) -> None:
        self.base, self.options, self.sites = base, options, sites
        self.times = StageTimes()
        self.processes = Processes(process_group, sites.matrices, sites.model)
        self.losses = Losses(self.processes)
        self.schedule = Schedule(options.schedule)
        weights = options.curvature.modality_weights
        self.capture = Capture(options.recording, self.times, self.processes, weights)
        self.curvature = Curvature(options.curvature, self.times)
        self.ranks = Ranks(base, options.ranks, self.times)
        self.preconditioning = Preconditioning(base, options, self.times)
        self._tapped = 0  # how often sites were tapped

    # ---------------------------------------------------------------- all or nothing

    def all_or_nothing(self, *flat: Any, own_only: bool = False) -> AbstractContextManager[None]:
        """Puts back bit by bit what the body has changed, if it raises: the pairs and everything about them.

        That is A and B, their gradients, the base's state of them and its groups, and our own state. Ctrl-C
        counts as an error too. All of this so stays in one system of coordinates.

        Args:
            flat: what else the body changes: dicts, lists, modules or other objects, of which the attributes
                are put back.
            own_only: the body changes our own state alone.
        """
        if own_only:
            return self._undone_on_failure([], flat, [], apart=[self.base])
        pairs = [p for c in self.curvature.buckets for group in c.bucket.groups for p in group.parameters]
        states = [self.base.state[p] for p in pairs if p in self.base.state]
        held = [*states, self.base.param_groups]
        return self._undone_on_failure(held, [self.base.state, *flat], pairs, apart=[self.base])

    def loading(self) -> AbstractContextManager[None]:
        """As :meth:`all_or_nothing`, for the whole state of the base, and without the weights."""
        return self._undone_on_failure([self.base], [], [], apart=[])

    @contextmanager
    def _undone_on_failure(
        self, held: Sequence[Any], flat: Sequence[Any], weights: Sequence[Tensor], apart: Sequence[Any]
    ) -> Iterator[None]:
        own = [self.sites, self.schedule, self.curvature, self.ranks, self.preconditioning]
        parameters = [p for group in self.base.param_groups for p in group["params"]]
        apart = [*apart, self.times, self.capture.hooks, *parameters]
        undo = Undo([*held, *own], [self.capture], flat, weights, apart)
        tapped, capture = self._tapped, self.capture.state_dict()
        try:
            yield
        except BaseException:
            undo.put_back()
            if self._tapped != tapped:
                self.capture.attach(self.sites.all, [c.bucket for c in self.curvature.buckets])
                self.capture.load_state_dict(capture)
                self.capture.plan(self.schedule.steps)
            raise

    # ---------------------------------------------------------------- which sites

    @property
    def follows_loss(self) -> bool:
        """Whether a schedule needs the losses."""
        return self.schedule.follows_loss or self.ranks.follows_loss

    def start(self, sites: list[Site], origin: Mapping[str, Origin] | None = None) -> None:
        """Work on these sites, of which ``origin`` tells what they were at first.

        Raises:
            ValueError: two sites share a name or a matrix, the base does not hold one, a budget that cannot
                be met, or ``modality_weights`` that do not fit the model.
        """
        self.ranks.remember(sites, origin or {}, largest_adapter(self.sites.model))
        self.capture.watch_tokens(self.sites.model, sites)
        self.attach(sites)
        if self.follows_loss:
            self.losses.attach(self.sites.model)

    def close(self) -> None:
        """Remove every hook from the model."""
        self.losses.detach()
        self.capture.close()

    def take(self, sites: list[Site] | None) -> None:
        """Work on these sites from now on, with what is known of them so far; None changes nothing."""
        if sites is not None:
            self.ranks.remember(sites, self.ranks.origin, largest_adapter(self.sites.model))
            self.attach(sites)

    def attach(self, sites: list[Site], known: Mapping[str, SiteState] | None = None) -> None:
        """Stack and tap the sites.

        Args:
            sites: the LoRA pairs.
            known: saved state by site name; by default the present state.
        """
        with full_precision(), self.all_or_nothing(own_only=True):
            known = self.pack_sites(with_operators=True) if known is None else known
            buckets = self.sites.take(sites)
            self._start_anew(buckets)
            self._tapped += 1
            self.capture.attach(sites, buckets)
            self.unpack_sites(known)

    def _start_anew(self, buckets: Sequence[Bucket]) -> None:
        """Know nothing of the sites of these buckets."""
        self.ranks.attach(buckets)
        self.curvature.attach(self.ranks.kept)
        self.preconditioning.attach(self.curvature)

    def follow_model(self) -> None:
        """Notice weights that were replaced, moved to another device, or loaded since the last step.

        Raises:
            ValueError: the budget cannot be met by the pairs.
        """
        self.ranks.check_budget()
        remaining = self.sites.remaining()
        if remaining is None:
            self.ranks.follow_loaded_weights(self.curvature.buckets, self.sites.weight_versions)
        else:
            self.attach(remaining)

    def follow_groups(self) -> None:
        """Tap pairs that are trained now and were not: unfrozen, or in the base's groups since."""
        if self.sites.grown():
            with self.all_or_nothing(own_only=True):
                self.take(self.sites.with_trained())

    # ---------------------------------------------------------------- in a step

    def take_loss(self, returned: Any) -> Tensor | float | None:
        """The loss of the step, told or ``returned``; the mean over processes where a schedule needs it."""
        self.processes.look()
        loss = self.losses.take(returned, self.curvature.device if self.follows_loss else None)
        self.ranks.observe(loss)
        return loss

    def exchange(self) -> None:
        """Take part, with nothing of this process's own, in what the processes exchange in a step."""
        with full_precision():
            self.take_loss(None)
            self.capture.exchange()

    def refresh_if_due(self) -> None:
        """Derive from the factors what is applied around the step."""
        if not self.preconditioning.refresh_due(self.schedule):
            return
        turns = self.preconditioning.mode.changes_coordinates
        moves = turns or self.curvature.gradient_moments_in_operators
        guard = self.all_or_nothing(own_only=not turns) if moves else nullcontext()
        with self.times("refresh"), guard:
            policy = self.ranks.policy(self.schedule.steps)
            self.preconditioning.refresh(self.curvature, self.schedule, policy)

    def reproject_if_due(self) -> None:
        """Reproject the pairs, and adapt their ranks."""
        if self.options.ranks.reprojection == "none" or not self.schedule.reprojection_due():
            return
        with self.times("reproject"), self.all_or_nothing():  # with all that is in their coordinates
            self.preconditioning.to_plain_coordinates(self.curvature)
            self.ranks.reproject(self.curvature.buckets, self.schedule.steps)
            if self.ranks.gives_up:
                self._refresh_moved()

    def as_settled(self) -> tuple[Ranks, list[BucketCurvature]]:
        """As :meth:`Ranks.as_settled`."""
        return self.ranks.as_settled(self.curvature.buckets)

    @full_precision()
    def reduce(self, plan: Plan) -> None:
        """Give up ranks now, for good."""
        with self.all_or_nothing():
            self.ranks.settle(self.curvature.buckets)
            self.preconditioning.to_plain_coordinates(self.curvature)
            buckets, steps = self.curvature.buckets, self.schedule.steps
            self.ranks.truncate(buckets, plan.found, plan.wanted, steps, for_good=True)
            self._refresh_moved()

    def to_plain_coordinates(self) -> None:
        """Bring the base's state to the coordinates of A and B themselves, so that it can go on alone."""
        with self.all_or_nothing():
            self.preconditioning.to_plain_coordinates(self.curvature)

    def _refresh_moved(self) -> None:
        policy = self.ranks.policy(self.schedule.steps)
        self.preconditioning.refresh_moved(self.curvature, self.schedule, policy)

    def end_step(self, loss: Tensor | float | None) -> None:
        """Count the step, and say what is to be recorded in the next."""
        self.schedule.advance(loss)
        self.ranks.end_step(self.sites.weight_versions)
        self.capture.plan(self.schedule.steps)

    def known_model(self, model: nn.Module | None) -> nn.Module | None:
        """The model given, else the one that the optimizer was built with, if it is still there."""
        return model if model is not None else self.sites.model

    # ---------------------------------------------------------------- the state of each pair

    def pack_sites(self, with_operators: bool) -> dict[str, SiteState]:
        """The state of each pair as tensors of its own: name to ``{"activation": [r, r], …, "rank": []}``."""
        packed = {}
        for curvature in self.curvature.buckets:
            for position, (name, state) in enumerate(curvature.pack(with_operators).items()):
                state.update(curvature.ranks.pack(position))
                if with_operators:
                    state.update(self.preconditioning.penalties.pack(curvature.bucket, position))
                packed[name] = state
        there = {site.name for site in self.sites.present()}  # another may have a deleted one's name
        return {name: state for name, state in packed.items() if name in there}

    def unpack_sites(self, packed: Mapping[str, SiteState]) -> None:
        """Put saved states back; a pair that has none, or whose rank differs, keeps what it has."""
        for curvature in self.curvature.buckets:
            for position, name in enumerate(curvature.bucket.names()):
                state = packed.get(name)
                if state is None or state["activation"].shape[-1] != curvature.bucket.rank:
                    continue
                curvature.unpack(position, state)
                curvature.ranks.unpack(position, state)
                self.preconditioning.penalties.unpack(curvature.bucket, position, state)

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts."""
        kept = self.preconditioning.mode.moments_in_operators or self.curvature.gradient_moments_in_operators
        with_operators = kept or self.schedule.refreshes_seldom
        held = self.sites.held()  # an optimizer that is built without the others is to load this
        return {
            "version": VERSION,
            **self.schedule.state_dict(),
            **self.capture.state_dict(),
            **self.preconditioning.state_dict(),
            **self.ranks.state_dict(),
            "fisher": self.curvature.kind,
            "sites": {n: state for n, state in self.pack_sites(with_operators).items() if n in held},
        }

    def state_by_parameter(self, state: Mapping[Any, Any]) -> Any:
        """The base's state of each parameter, with our own beside it."""
        return spread(state, self.state_dict(), self.sites.present(), self.base.param_groups)

    def names_of_state(self) -> Any:
        """Each parameter with the names of what :meth:`state_by_parameter` has of it."""
        return names_of_state(self.base.state, self.sites.present(), self.base.param_groups)

    def collect_state(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The base's part and our own, where that lies with the parameters' state; else None for it."""
        return collected(state_dict, self.sites.all_trainable(), self.base.param_groups)

    def check_state_dict(self, own: Any) -> None:
        """Refuse a state that does not belong to these sites, before anything is loaded.

        Raises:
            ValueError: the version is newer, site names differ, or a site's rank does; or an entry is
                missing, of the wrong type or shape, out of range, or not finite.
        """
        names = names_of_sites(own)
        sites = self.sites.with_named(names) or self.sites.all
        left = {site.name for site in self.sites.all} - self.sites.held()
        check_state(own, [site for site in sites if site.name not in left or site.name in names])

    @full_precision()
    def load_state_dict(self, own: Mapping[str, Any] | None) -> None:
        """Go on from a state; from None start anew."""
        own = own or {"sites": {}}
        self.take(self.sites.with_named(own["sites"].keys()))
        self.capture.load_state_dict(own)
        self.schedule.load_state_dict(own)
        self.capture.plan(self.schedule.steps)
        self._start_anew([kept.bucket for kept in self.ranks.kept])
        self.preconditioning.load_state_dict(own)
        self.unpack_sites(own["sites"])
        self.ranks.load_state_dict(own, self.sites.all)
        mode, fisher = own.get("precondition"), own.get("fisher", "kfac")
        self.preconditioning.turn_back_from(mode, self.curvature)
        if own["sites"] and (mode, fisher) != (self.preconditioning.mode.name, self.curvature.kind):
            # Operators of another kind; the next refresh derives our own.
            for curvature in self.curvature.buckets:
                curvature.drop_operators(same_fisher=fisher == self.curvature.kind)
        elif not any("a_operator" in state for state in own["sites"].values()):
            policy = self.ranks.policy(max(0, self.schedule.steps - 1))
            self.preconditioning.derive_loaded(self.curvature, self.schedule, policy)
