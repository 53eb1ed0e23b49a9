"""The curvature at work: operators derived from it, and what they do around the base optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from grit_optim.base.rounds import steps_each_alone, without_gradients
from grit_optim.base.settings import group_by_parameter
from grit_optim.base.wrapper import step_within
from grit_optim.curvature.curvature import Curvature
from grit_optim.integrity.fields import Fields, text, whole
from grit_optim.linalg import full_precision
from grit_optim.options import Options
from grit_optim.preconditioners.held_gradients import (
    Held,
    Outcome,
    Unit,
    all_finite,
    clip,
    give_back,
    hand_over,
    in_rounds,
    norm,
    units_with_gradient,
)
from grit_optim.preconditioners.mode import Mode
from grit_optim.preconditioners.modes import MODES, mode_named
from grit_optim.preconditioners.none import Identity
from grit_optim.preconditioners.penalties import Penalties
from grit_optim.processes.pieces import Sharing, Work, do
from grit_optim.profiling import StageTimes
from grit_optim.rank.selection import RankPolicy
from grit_optim.schedules import Schedule


class Preconditioning:
    """The mode, the penalties, and what the latest step did.

    Attributes:
        mode: the way to use the curvature.
        penalties: on the pairs.
        refreshes: times the operators were derived anew.
        outcomes: what the latest step did, for the modes that hold the gradients.
    """

    def __init__(self, base: Optimizer, options: Options, times: StageTimes) -> None:
        self.mode = mode_named(options.preconditioning.precondition)(base, options.preconditioning)
        self.penalties = Penalties(options.penalties, options.ranks.reprojection == "one_sided")
        self.refreshes = 0
        self.outcomes: list[Outcome] = []
        self._base = base
        self._idle = Identity(base, options.preconditioning)
        self._max_grad_norm = options.preconditioning.max_grad_norm
        self._times = times

    def attach(self, curvature: Curvature) -> None:
        """Work on the pairs of these buckets from now on."""
        self.outcomes = []  # they name places in the buckets of before
        self.penalties.attach([c.bucket for c in curvature.buckets])

    def refresh_due(self, schedule: Schedule) -> bool:
        """Whether operators are to be derived anew in this step; to be asked once a step."""
        return schedule.refresh_due() and (self._turns(schedule) or self.penalties.active)

    def _turns(self, schedule: Schedule) -> bool:
        """Whether the mode derives operators: in the warm-up only where the coordinates stay."""
        return not (schedule.warming_up and self.mode.changes_coordinates)

    def refresh(self, curvature: Curvature, schedule: Schedule, policy: RankPolicy) -> None:
        """Derive from the factors what the mode applies, and what the penalties do."""
        curvature.scale_damping(schedule.damping_scale)
        for one in curvature.buckets:
            if self._turns(schedule):
                self.mode.refresh(one)
            self.penalties.refresh(one, policy)
        self.refreshes += 1

    def derive_loaded(self, curvature: Curvature, schedule: Schedule, policy: RankPolicy) -> None:
        """Derive what a checkpoint leaves out, since it follows from the factors of the same step."""
        if schedule.steps > 0 and not self.mode.changes_coordinates:
            done = self.refreshes
            self.refresh(curvature, schedule, policy)
            self.refreshes = done

    def refresh_moved(self, curvature: Curvature, schedule: Schedule, policy: RankPolicy) -> None:
        """Refresh operators and penalties after the pairs have changed coordinates."""
        for one in curvature.buckets:
            if not schedule.warming_up:
                self.mode.refresh(one)
            self.penalties.refresh(one, policy)

    @full_precision()
    def to_plain_coordinates(self, curvature: Curvature) -> None:
        """Bring the base's state back to the coordinates of A and B themselves."""
        for one in curvature.buckets:
            self.mode.to_plain_coordinates(one)

    def step(
        self, curvature: Curvature, schedule: Schedule, as_called: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Step the base while the pairs' gradients are replaced. Then change that step.

        A base that steps each parameter alone does it in rounds of few matrices, so that what is held beside
        weights and state does not grow with the model. The parameters' own gradients are back afterwards.
        Where the base fails, a matrix is as it was, or has taken the whole step.

        Args:
            curvature: of all pairs.
            schedule: the step.
            as_called: the context in which the caller has the base stepped.
        """
        mode = self._idle if schedule.warming_up else self.mode
        penalty = self.penalties.share(schedule.steps)
        # The mode that is to come decides: its guard against gradients that are not finite holds in the
        # warm-up too.
        needed = self.mode.holds_gradients or self._max_grad_norm is not None or penalty > 0
        with self._times("precondition"):
            settings = group_by_parameter(self._base)
            units = units_with_gradient(curvature.buckets, settings) if needed else []
            if penalty == 0:
                units = [unit.in_parts() for unit in units]
            rounds = self._rounds(units)
            finite = all_finite(unit for some in rounds for unit in some)
        places = {id(one): i for i, one in enumerate(curvature.buckets)}
        outcomes: list[Outcome] = []
        for some, others in zip(rounds, self._others(rounds), strict=True):
            with without_gradients(others):
                held = self._around(mode, some, finite, penalty, as_called)
            outcomes += [one.outcome(places[id(one.curvature)]) for one in held]
            del held  # not beside the next round's
        self.outcomes = outcomes

    def _rounds(self, units: list[Unit]) -> list[list[Unit]]:
        """What is worked on together: everything with ``max_grad_norm``, since a joint norm is of all."""
        alone = self._max_grad_norm is None and steps_each_alone(self._base)
        return (in_rounds(units) if alone else []) or [units]

    def _others(self, rounds: list[list[Unit]]) -> Iterator[list[Tensor]]:
        """The parameters that are not to be stepped in each round; those of no unit are, in the first."""
        held = {id(p): p for group in self._base.param_groups for p in group["params"]}
        in_turn = [{id(p) for unit in some for p in unit.group.parameters} for some in rounds]
        for i, now in enumerate(in_turn):
            later = in_turn[1:] if i == 0 else [held.keys() - now]
            yield [held[key] for keys in later for key in keys]

    def _around(
        self,
        mode: Mode,
        units: list[Unit],
        finite: Tensor | None,
        penalty: float,
        as_called: Callable[[], AbstractContextManager[None]],
    ) -> list[Held]:
        """Replace the gradients of one round, step the base, and change its step."""
        held: list[Held] = []
        try:
            with self._times("precondition"):
                do(self._prepared(mode, held, unit, finite, penalty) for unit in units)
                if self._max_grad_norm is not None:
                    clip(held, self._max_grad_norm)
                hand_over(held)
            with self._times("base"), as_called():
                step_within(self._base)
            with self._times("precondition"):
                do((one.sharing, mode.after(one)) for one in held)
        except BaseException:
            for one in held:
                mode.abandon(one)
            raise
        finally:
            give_back(held)
        return held

    def _prepared(
        self, mode: Mode, held: list[Held], unit: Unit, finite: Tensor | None, penalty: float
    ) -> tuple[Sharing | None, Work[None]]:
        """Hold the gradients of one group, with the work that is to be done on them."""
        held.append(one := unit.hold(finite))
        return one.sharing, self._prepare(mode, one, penalty)

    def _prepare(self, mode: Mode, held: Held, penalty: float) -> Work[None]:
        """Precondition one group's gradient, and add what the penalties give."""
        held.gradient_norm = norm(held.gradient)
        extra = self.penalties.gradient(held.curvature.bucket, held.group, penalty) if penalty else None
        yield from mode.before(held)
        if extra is not None:  # after the preconditioner, which so never sees it
            ascends = held.settings.get("maximize", False)
            held.gradient = held.gradient + mode.as_the_base_sees(held, -extra if ascends else extra)

    def turn_back_from(self, mode: str | None, curvature: Curvature) -> None:
        """Bring the base's moments to plain coordinates, where the loaded mode kept them in its operators."""
        other = MODES.get(mode or "")
        if other is not None and other.moments_in_operators and not isinstance(self.mode, other):
            turning = other(self._base, self.mode.options)
            for one in curvature.buckets:
                turning.to_plain_coordinates(one)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the operators of each pair."""
        return {"precondition": self.mode.name, "refreshes": self.refreshes}

    @staticmethod
    def saved_fields() -> Fields:
        """What a checkpoint may hold under the names of :meth:`state_dict`."""
        return {"precondition": text(MODES), "refreshes": whole()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, or start anew from an empty one."""
        self.refreshes = state.get("refreshes", 0)
