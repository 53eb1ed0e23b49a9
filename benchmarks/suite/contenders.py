"""The suites: which contenders take part, and the sizes of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..base_model.source import EMBEDDED
from ..core.files import BenchmarkError
from ..peers.registry import LR_CENTRES

DEFAULT_CENTRE = 5e-3
PHASES = ("explore", "narrow", "budgets", "cost")


@dataclass(frozen=True)
class Contender:
    """An optimizer with its settings; `lr` is the centre of its grid of learning rates, whose factor is 2."""

    label: str
    optimizer: str
    beta1: float = 0.9
    beta2: float = 0.99
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = DEFAULT_CENTRE

    def rate(self, place: int) -> float:
        """The learning rate `place` factors of 2 above the centre."""
        return self.lr * 2.0**place


@dataclass(frozen=True)
class SuiteSettings:
    """Sizes of a suite's runs; lengths in optimizer steps, budgets as shares of `steps`."""

    steps: int = 60  # the full budget
    explore_steps: int = (
        60  # of the runs that first search the rates; at the full budget these are not run twice
    )
    batch_size: int = 48
    rank: int = 16
    alpha: int = 16
    weight_decay: float = 0.0
    warmup: int = 5
    eval_every: int = 60  # at the full budget; shorter and longer runs are measured at their end alone
    seeds: tuple[int, ...] = (0, 1, 2)  # the first one searches, all of them decide
    margin: float = 0.02  # nats behind the best with the first seed, from which a rate gets no further seeds
    extensions: int = 4  # rates that may be added beyond the first three before the search gives up
    budget_grid: float = 0.05  # distance between two budgets
    shortest_budget: float = 0.4  # where the bisection begins; who reaches the target there goes on below it
    longest_budget: float = 1.0  # where a contender that misses the target at the full budget is tried
    cost_steps: int = 40  # timed steps of each of the two that take turns
    device: str = "cpu"
    precision: str = "bf16"
    base: str = EMBEDDED  # the base model's name
    adapted_layers: int | None = None  # of the last decoder layers; None: all
    train_examples: int | None = None  # drawn of each task's; None: all
    eval_examples: int | None = None

    def budgets(self) -> list[int]:
        """The grid of budgets in steps, rising, with the full budget in it; none ends within the warm-up."""
        places = range(1, round(self.longest_budget / self.budget_grid) + 1)
        lengths = {self._steps_at(place) for place in places}
        return sorted(
            {length for length in lengths if length > self.warmup} | {self.lowest_budget(), self.steps}
        )

    def lowest_budget(self) -> int:
        """Where the bisection begins, in steps."""
        return self._steps_at(round(self.shortest_budget / self.budget_grid))

    def _steps_at(self, place: int) -> int:
        return max(1, round(self.steps * self.budget_grid * place))


# Those that a suite's runs share with plain ones.
RUN_SETTINGS = (
    "steps", "batch_size", "rank", "alpha", "weight_decay", "warmup", "eval_every", "precision",
    "adapted_layers",
)  # fmt: skip
# What two stays in one folder must share; the rest only says how far the search goes.
EXAMPLES = ("train_examples", "eval_examples")
FIXED_SETTINGS = (*RUN_SETTINGS, "explore_steps", "device", "base", *EXAMPLES)
# One seed, so exploring at the full budget is cheapest: the runs are then those that the narrowing needs.
QUICK_SETTINGS = SuiteSettings(batch_size=16, seeds=(0,), budget_grid=0.1, cost_steps=20)


def _contender(label: str, optimizer: str = "", beta1: float = 0.9, beta2: float = 0.99) -> Contender:
    optimizer = optimizer or label
    centre = LR_CENTRES.get(optimizer, LR_CENTRES["grit"])  # what has none of its own is a variant of GRIT
    return Contender(label, optimizer, beta1, beta2, {}, centre)


_PEERS = (
    "loraplus", "lorafa", "riemannian", "lorarite", "soap-rank", "soap-full", "shampoo-rank", "shampoo-full",
    "kl-shampoo",
    "kl-soap", "muon", "singd", "adamw8bit",
)  # fmt: skip
_ABLATIONS = ("grit-eigenbasis", "grit-steer", "grit-balanced", "grit-inverse", "grit-paper")

# AdamW's own momentum is swept, or a gain that comes from less momentum would be credited to another update
# rule; so is that of the peers that came nearest to the default with their own.
SUITES: dict[str, tuple[Contender, ...]] = {
    "peers": (
        _contender("adamw"),
        _contender("adamw-0.8", "adamw", 0.8),
        _contender("adamw-0.6", "adamw", 0.6),
        _contender("adamw-0.9-0.95", "adamw", 0.9, 0.95),
        *map(_contender, _PEERS),
        _contender("soap-rank-0.6", "soap-rank", 0.6),
        _contender("lorarite-0.6", "lorarite", 0.6),
        _contender("kl-soap-0.6", "kl-soap", 0.6),
        replace(_contender("muon-0.8", "muon"), options={"momentum": 0.8}),
        replace(_contender("muon-0.6", "muon"), options={"momentum": 0.6}),
        _contender("grit"),
        *map(_contender, _ABLATIONS),
    )
}
QUICK_CONTENDERS = ("adamw", "adamw-0.6", "loraplus", "riemannian", "lorarite", "soap-rank", "grit")
QUICK_TASKS = 2  # the first so many


def cost_name(task: str, label: str) -> str:
    """Name of the file that holds the step time of a contender."""
    return f"cost-{task}-{label}.json"


def check_suite(name: str) -> tuple[Contender, ...]:
    """The suite's contenders, or an error that lists the known suites."""
    if name not in SUITES:
        raise BenchmarkError(f"unknown suite {name!r}; known: {', '.join(sorted(SUITES))}")
    return SUITES[name]


def choose(suite: str, labels: Sequence[str] | None) -> tuple[Contender, ...]:
    """The contenders of these labels, in the suite's order; all of them for None."""
    contenders = check_suite(suite)
    known = [contender.label for contender in contenders]
    unknown = [label for label in labels or () if label not in known]
    if unknown:
        raise BenchmarkError(
            f"no contender {', '.join(unknown)} in suite {suite!r}; known: {', '.join(known)}"
        )
    return tuple(contender for contender in contenders if labels is None or contender.label in labels)


def check_settings(settings: SuiteSettings) -> SuiteSettings:
    """The settings themselves, or an error that names what does not fit together."""
    if settings.explore_steps > settings.steps:
        raise BenchmarkError(
            f"explore_steps {settings.explore_steps} is more than the full budget of {settings.steps} steps"
        )
    if not 0 < settings.shortest_budget <= 1 <= settings.longest_budget:
        raise BenchmarkError(
            f"budgets from {settings.shortest_budget:g} to {settings.longest_budget:g} of the full one do "
            "not contain 1"
        )
    return replace(settings, seeds=tuple(settings.seeds), eval_every=min(settings.eval_every, settings.steps))
