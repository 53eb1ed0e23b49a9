"""The parts of a GritOptimizer: they work on the same LoRA pairs, and a checkpoint keeps their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.capture.capture import Capture
from grit_optim.capture.losses import Losses
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.curvature.curvature import Curvature
from grit_optim.linalg import full_precision
from grit_optim.lora.buckets import Bucket
from grit_optim.lora.site import Site
from grit_optim.lora.site_set import SiteSet
from grit_optim.messages import listed
from grit_optim.options import Options
from grit_optim.preconditioners.preconditioning import Preconditioning
from grit_optim.profiling import StageTimes
from grit_optim.rank.adaptation import Ranks
from grit_optim.rank.budget import Origin
from grit_optim.rank.plan import Plan
from grit_optim.schedules import Schedule

VERSION = 1
KEY = "grit"
"""The key of a ``state_dict()`` under which the state of the parts lies."""

SiteState = dict[str, Tensor]


class Parts:
    """What an optimizer is made of.

    The state is plain containers and fp32 tensors, keyed by site name. What can be derived from the factors
    at the next step is left out. Operators are saved only where they come from factors that have moved on
    since, or where moments are expressed in them.

    Args:
        base: the optimizer that holds the parameters.
        options: of all parts.
        sites: the LoRA pairs.

    Attributes:
        base: the optimizer that holds the parameters.
        options: of all parts.
        times: seconds spent in each stage.
        losses: the loss of each step.
        schedule: how many steps are done, and what is due.
        sites: the LoRA pairs.
        capture: what the passes of a step show.
        curvature: the Fisher information.
        ranks: directions kept, and given up.
        preconditioning: what the curvature does to a step.
    """

    def __init__(self, base: Optimizer, options: Options, sites: SiteSet) -> None:
        self.base, self.options, self.sites = base, options, sites
        self.times = StageTimes()
        self.losses = Losses()
        self.schedule = Schedule(options.schedule)
        self.capture = Capture(options.capture, self.times)
        self.curvature = Curvature(options.curvature, self.times)
        self.ranks = Ranks(base, options.ranks, self.times)
        self.preconditioning = Preconditioning(base, options, self.times)

    # ---------------------------------------------------------------- which sites

    @property
    def follows_loss(self) -> bool:
        """Whether a schedule needs the losses."""
        return self.schedule.follows_loss or self.ranks.follows_loss

    def start(self, sites: list[Site], origin: Mapping[str, Origin] | None = None) -> None:
        """Work on these sites, of which ``origin`` tells what they were at first.

        Raises:
            ValueError: two sites share a name or a matrix, the base does not hold one, or a budget that
                cannot be met.
        """
        self.ranks.remember(sites, origin or {})
        self.attach(sites)
        if self.follows_loss:
            self.losses.attach(self.sites.model)

    def take(self, sites: list[Site] | None) -> None:
        """Work on these sites from now on, with what is known of them so far; None changes nothing."""
        if sites is not None:
            self.ranks.remember(sites, self.ranks.origin)
            self.attach(sites)

    def attach(self, sites: list[Site], known: Mapping[str, SiteState] | None = None) -> None:
        """Stack and tap the sites.

        Args:
            sites: the LoRA pairs.
            known: saved state by site name; by default the present state.
        """
        known = self.pack_sites(with_operators=True) if known is None else known
        buckets = self.sites.take(sites)
        self._start_anew(buckets)
        self.capture.attach(sites, buckets)
        self.unpack_sites(known)

    def _start_anew(self, buckets: Sequence[Bucket]) -> None:
        """Know nothing of the sites of these buckets."""
        self.ranks.attach(buckets)
        self.curvature.attach(self.ranks.kept)
        self.preconditioning.attach(self.curvature)

    def follow_model(self) -> None:
        """Notice weights that were replaced, moved to another device, or loaded since the last step."""
        remaining = self.sites.remaining()
        if remaining is None:
            self.ranks.follow_loaded_weights(self.curvature.buckets, self.sites.weight_versions)
        else:
            self.attach(remaining)

    def tap_unfrozen(self) -> None:
        """Tap pairs that were frozen and are trained now."""
        if self.sites.unfrozen():
            self.take(self.sites.with_trained())

    # ---------------------------------------------------------------- in a step

    def take_loss(self, returned: Any) -> Tensor | float | None:
        """The loss of the step, if somebody has told it; the mean over processes where a schedule needs it.

        Args:
            returned: what the closure returned.
        """
        loss = self.losses.take(returned, self.curvature.device if self.follows_loss else None)
        self.ranks.observe(loss)
        return loss

    def refresh_if_due(self) -> None:
        """Derive from the factors what is applied around the step."""
        policy = self.ranks.policy(self.schedule.steps)
        self.preconditioning.refresh_if_due(self.curvature, self.schedule, policy)

    def reproject_if_due(self) -> None:
        """Reproject the pairs and adapt their ranks, with everything that is in their coordinates."""
        if self.options.ranks.reprojection == "none" or not self.schedule.reprojection_due():
            return
        with self.times("reproject"):
            self.preconditioning.to_plain_coordinates(self.curvature)
            self.ranks.reproject(self.curvature.buckets, self.schedule.steps)
            if self.ranks.gives_up:
                self._refresh_moved()

    def as_settled(self) -> tuple[Ranks, list[BucketCurvature]]:
        """Ranks and curvatures to ask questions of: see :meth:`Ranks.as_settled`."""
        return self.ranks.as_settled(self.curvature.buckets)

    @full_precision()
    def reduce(self, plan: Plan) -> None:
        """Give up ranks now, for good."""
        self.ranks.settle(self.curvature.buckets)
        self.preconditioning.to_plain_coordinates(self.curvature)
        self.ranks.truncate(
            self.curvature.buckets, plan.found, plan.wanted, self.schedule.steps, for_good=True
        )
        self._refresh_moved()

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
        return packed

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
        with_operators = (
            self.schedule.refreshes_seldom
            or self.preconditioning.mode.moments_in_operators
            or self.curvature.gradient_moments_in_operators
        )
        return {
            "version": VERSION,
            **self.schedule.state_dict(),
            **self.capture.state_dict(),
            **self.preconditioning.state_dict(),
            **self.ranks.state_dict(),
            "fisher": self.curvature.kind,
            "sites": self.pack_sites(with_operators),
        }

    def check_state_dict(self, own: Mapping[str, Any]) -> None:
        """Refuse a state that does not belong to these sites, before anything is loaded.

        Raises:
            ValueError: the version is newer, site names differ, or a site's rank does.
        """
        if own.get("version", 0) > VERSION:
            raise ValueError(
                f"the checkpoint's GRIT state has version {own['version']}, this grit_optim reads up to "
                f"{VERSION}; upgrade grit_optim"
            )
        sites = self.sites.with_named(own["sites"].keys()) or self.sites.all
        ranks = {site.name: site.rank for site in sites}
        _check_names(ranks.keys(), own["sites"].keys())
        for name, rank in ranks.items():
            saved_rank = own["sites"][name]["activation"].shape[-1]
            if saved_rank != rank:
                raise ValueError(
                    f"site {name!r} has rank {rank}, in the checkpoint {saved_rank}; build the adapter with "
                    "the checkpoint's rank"
                )

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


def narrowed(state: SiteState, rank: int) -> SiteState:
    """A pair's state for its leading ``rank`` coordinates alone: ``[r, r]`` to ``[rank, rank]``."""
    return {key: value[:rank, :rank].clone() if value.dim() == 2 else value for key, value in state.items()}


def _check_names(here: Set[str], saved: Set[str]) -> None:
    missing, extra = sorted(here - saved), sorted(saved - here)
    if missing or extra:
        raise ValueError(
            f"the checkpoint's GRIT state is of other LoRA sites: {_some(missing)} of this model not in it, "
            f"{_some(extra)} of the checkpoint not in this model. Build the model and its adapter as they "
            f"were when the checkpoint was saved, or drop the state with `state_dict.pop({KEY!r})` to start "
            "the curvature anew"
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({listed(names, 3)})" if names else "none"
