"""The rank budget: how many parameters all sites together may keep, and how that changes in training."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from grit_optim.integrity.fields import Fields, tensor, whole
from grit_optim.messages import warn
from grit_optim.options import RankOptions
from grit_optim.rank.origin import Origin


def parameters(budget: float, total: int) -> float:
    """A budget as a number of parameters: a float is a share of ``total``, an int is the number itself."""
    return budget * total if isinstance(budget, float) else float(budget)


def full_parameters(origins: Collection[Origin]) -> int:
    """The parameters of all sites when the optimizer was first built. A share refers to this number."""
    return sum(origin.parameters for origin in origins)


def check(name: str, budget: float, origins: Collection[Origin], floor: int) -> None:
    """Refuse a budget that cannot be met.

    Args:
        name: the option's name, for the message.
        budget: the budget, a float share or an int number of parameters.
        origins: all sites as they were at first.
        floor: ``min_lora_rank``.

    Raises:
        ValueError: the budget is less than ``floor`` keeps, less than one direction, or more than all
            parameters; or no pair is trained yet.
    """
    if not origins:
        raise ValueError(
            f"{name}={budget!r} shares out the parameters of the pairs in training, and none is trained yet. "
            "Unfreeze the adapter and train first"
        )
    if (problem := _problem(name, budget, origins, floor, full_parameters(origins))) is not None:
        raise ValueError(problem)


def _problem(name: str, budget: float, origins: Collection[Origin], floor: int, at_first: int) -> str | None:
    """Why a budget cannot be met if the adapter had ``at_first`` parameters at first; None if it can."""
    directions = [(min(floor, origin.rank), origin.parameters // origin.rank) for origin in origins]
    least = sum(count * size for count, size in directions) or min(size for _, size in directions)
    total = full_parameters(origins)
    if parameters(budget, at_first) > at_first:
        return (
            f"{name}={budget!r} is more than the {total:,} parameters that the adapter has, so it would "
            "change nothing. Pass a smaller number, or a float in (0, 1] for a share of them"
        )
    wanted = parameters(budget, total)
    if parameters(budget, at_first) < least:
        what = (
            f"min_lora_rank={floor} keeps {least:,}"
            if floor
            else f"the smallest direction of any site has {least:,}"
        )
        return (
            f"{name}={budget!r} is {math.floor(wanted):,} of the adapter's {total:,} parameters, but "
            f"{what}; raise the budget{', or lower min_lora_rank' if floor else ''} (a float is a share of "
            "the parameters, a whole number a number of them)"
        )
    return None


TOLERANCE = 0.01
"""Relative rise of the mean loss above the lowest mean so far at which an "adaptive" budget stands still."""


class BudgetSchedule:
    """The course of the budget from ``start`` to ``end``.

    Attributes:
        start: parameters at the beginning.
        end: parameters at the end.
        kind: ``"linear"``; ``"cosine"``: half a period of a cosine, slow at both ends; ``"adaptive"``:
            linear, but it stands still while the loss is more than :data:`TOLERANCE` above its lowest mean so
            far.
        first: step at which the change begins.
        steps: number of steps that it takes; 0: ``end`` at once.
        progress: the share of the course that is done, a scalar in [0, 1].
    """

    def __init__(self, start: float, end: float, kind: str, first: int, steps: int) -> None:
        self.start, self.end, self.kind = start, end, kind
        self.first, self.steps = first, steps
        self._warned = self._observed = False
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        self.progress, self._sum, self._count, self._lowest, self._last = (
            zero,
            zero,
            zero,
            zero + torch.inf,
            first,
        )

    @property
    def rises(self) -> bool:
        """Whether the budget rises, so that directions are given back."""
        return self.steps > 0 and self.start < self.end

    def observe(self, loss: Tensor | float) -> None:
        """Take note of a loss, of training or of held-out data. A loss that is not finite is left out."""
        device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        value = torch.as_tensor(loss, dtype=torch.float64, device=device).detach()
        self._observed = True
        finite = value.isfinite()
        self._sum = self._sum.to(value.device) + torch.where(finite, value, 0.0)
        self._count = self._count.to(value.device) + finite

    def advance(self, step: int) -> Tensor:
        """The budget at ``step`` in parameters, a scalar. Call it once per reprojection from ``first`` on."""
        if self.kind == "adaptive":
            self._advance_unless_loss_suffers(step)
        else:
            done = 1.0 if self.steps == 0 else min(1.0, (step - self.first) / self.steps)
            self.progress = torch.tensor(done, dtype=torch.float64, device="cpu")
        way = (1 - torch.cos(math.pi * self.progress)) / 2 if self.kind == "cosine" else self.progress
        return self.start + (self.end - self.start) * way

    def _advance_unless_loss_suffers(self, step: int) -> None:
        """Count the steps since the last call as progress, unless the mean loss since then is too high.

        The decision is made on the device where the losses lie, and not read back.
        """
        self._warn_if_blind(step)
        mean, known = self._sum / self._count, self._count > 0
        lowest = self._lowest.to(mean.device)
        suffers = mean > lowest + TOLERANCE * lowest.abs()
        self._lowest = torch.where(known, torch.minimum(lowest, mean), lowest)
        gone = (known & ~suffers).double() * ((step - self._last) / self.steps)
        self.progress = (self.progress.to(mean.device) + gone).clamp_max(1.0)
        self._sum, self._count = torch.zeros_like(self._sum), torch.zeros_like(self._count)
        self._last = step

    def _warn_if_blind(self, step: int) -> None:
        """Warn once that no loss has been told, so that the budget stays where it starts."""
        if self._observed or self._warned or step <= self.first:
            return
        self._warned = True
        warn(
            "rank_budget_schedule='adaptive' stands still at its start, since no loss has been told. The "
            "model's output carries none. Call optimizer.observe(loss) after each backward pass, pass a "
            "closure to step(), or choose 'linear' or 'cosine'",
        )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as tensors and numbers."""
        return {
            "progress": self.progress.clone(),
            "loss_sum": self._sum.clone(),
            "loss_count": self._count.clone(),
            "lowest": self._lowest.clone(),
            "last": self._last,
        }

    @staticmethod
    def saved_fields() -> Fields:
        """What a checkpoint may hold under the names of :meth:`state`."""
        return {
            "progress": tensor(low=0, high=1),
            "loss_sum": tensor(),
            "loss_count": tensor(low=0),
            "lowest": tensor(finite=False),
            "last": whole(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. An empty one changes nothing."""
        if state:
            self.progress, self._lowest = state["progress"].clone(), state["lowest"].clone()
            self._sum, self._count, self._last = (
                state["loss_sum"].clone(),
                state["loss_count"].clone(),
                state["last"],
            )
            self._observed = True


def unmet(options: RankOptions, origins: Collection[Origin], largest: int) -> str | None:
    """Why the rank budget cannot be met by the adapter as it is; None if it can, or without a budget.

    An adapter that was cut by ``shrink_()`` had more parameters at first. How many, only its checkpoint says.

    Args:
        options: the rank options.
        origins: all sites as they were at first, as far as that is known.
        largest: the most parameters that the adapter can have had.

    Raises:
        ValueError: the start or the end of the budget could not be met by that many parameters either.
    """
    problem = None
    if not origins:  # no pair is trained yet
        return None
    for part, course in options.budgets.items():
        own = of_part(origins, part)
        name = f"rank_budget[{part!r}]" if part else "rank_budget"
        if not own:
            parts = sorted({origin.modality or "of no modality" for origin in origins})
            raise ValueError(
                f"{name} is a budget of the {part} part, and no pair of it is trained (the pairs are "
                f"{', '.join(parts)}). Let the adapter reach it (LoraConfig(target_modules=...)), say with "
                "modality_of which pairs belong to it, or leave it out"
            )
        most = max(largest, full_parameters(own))
        for budget, what in zip(course, (f"the start of {name}", name), strict=True):
            found = _problem(what, budget, own, options.min_lora_rank, full_parameters(own))
            if found and _problem(what, budget, own, options.min_lora_rank, most):
                raise ValueError(found)
            problem = found or problem
    return problem


def of_part(origins: Collection[Origin], part: str) -> list[Origin]:
    """The sites of one modality; all for ``""``."""
    return [origin for origin in origins if not part or origin.modality == part]


def make_schedules(options: RankOptions, origins: Collection[Origin]) -> dict[str, BudgetSchedule]:
    """The course of each part's rank budget in parameters; empty while no pair is trained.

    For ``rank_budget="effective"`` it is the course from 1 to 0 of what is left of the way.

    Args:
        options: the rank options.
        origins: all sites as they were at first.
    """
    way = options.rank_budget_schedule, options.rank_adaptation_start_step, options.rank_budget_steps
    if not origins:
        return {}
    if options.sizes_itself:
        return {"": BudgetSchedule(1.0, 0.0, *way)}
    found = {}
    for part, course in options.budgets.items():
        total = full_parameters(of_part(origins, part))
        start, end = (parameters(budget, total) for budget in course)
        found[part] = BudgetSchedule(start, end, *way)
    return found
