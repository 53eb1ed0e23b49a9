"""Checks, per site, that the taps see what the gradients are made of.

For every LoRA pair ``⟨A, ∇A⟩ = ⟨B, ∇B⟩ = Σ over tokens of h·δ``, since A enters the loss only through h = A x
and B only through B h. The loss scale and the trainer's clipping put a factor between gradients and taps that
is common to all sites. A factor of one site's own means that its tap missed, or saw twice, a part of what its
gradients come from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grit_optim.integrity.fields import Fields, by_name, several, some_text, whole
from grit_optim.lora.site import Site
from grit_optim.messages import listed, tell, warn
from grit_optim.processes import shards

CHECKED_STEPS = 5
"""Steps at the start in which taps are compared with gradients."""

RELATIVE_TOLERANCE = 0.02
"""Relative difference that passes for equal. bf16 autocast alone makes about 1 %."""
_FP32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class SiteReport:
    """What the tap of one site saw, against the site's gradients.

    Attributes:
        name: the site.
        fired: backward passes that its tap saw.
        tap_inner: Σ over tokens of h·δ; None where nothing was recorded.
        a_inner: ⟨A, ∇A⟩; None without a gradient, or with one of zeros only.
        b_inner: ⟨B, ∇B⟩; None without a gradient, or with one of zeros only.
        status: ``"ok"``; ``"unused"``: no gradient; ``"gradients"``: the site's curvature comes from its
            gradients, and no tap is needed; ``"silent"``: gradients, but the tap never fired;
            ``"mismatch"``: the tap saw something else than the gradients are made of; ``"unknown"``: nothing
            to compare (B is still zero, this step's tokens were not recorded, or a value is not finite).
    """

    name: str
    fired: int
    tap_inner: float | None
    a_inner: float | None
    b_inner: float | None
    status: str


def inspect(
    sites: Sequence[Site],
    seen: Sequence[tuple[int, Tensor | float | None]],
    rounding: float,
    compare: bool = True,
    by_gradients: Collection[str] = (),
) -> list[SiteReport]:
    """Compare taps and gradients now, after a backward pass and before the optimizer's step.

    Args:
        sites: the sites.
        seen: per site, how often its tap fired, and Σ over tokens of h·δ (up to a factor common to all) or
            None.
        rounding: the machine epsilon of the coarsest dtype that h or δ came in.
        compare: whether the amounts can be compared. Under data-parallel training they cannot: the taps of a
            process see its own tokens, and the gradients are averaged over all processes.
        by_gradients: names of sites whose curvature comes from their gradients.

    Returns:
        One report per site that has not been deleted.
    """
    measured = [
        _measure(site, fired, inner, rounding)
        for site, (fired, inner) in zip(sites, seen, strict=True)
        if not site.deleted
    ]
    ratios = [m.a_inner / m.tap_inner for m, _ in measured if m.a_inner and m.tap_inner]
    ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    common = statistics.median(ratios) if ratios else 1.0
    return [
        replace(report, status="gradients")
        if report.name in by_gradients
        else _judge(report, slack, common, compare)
        for report, slack in measured
    ]


def _measure(
    site: Site, fired: int, inner: Tensor | float | None, rounding: float
) -> tuple[SiteReport, float]:
    """A report with the three amounts, not judged yet, and the rounding error to expect in them.

    Each entry of a gradient is off by ``rounding`` times itself, independently of the others. The sum over
    all entries is then off by rounding·‖w ∘ ∇w‖, which matters where the sum itself nearly cancels.
    """
    products: list[float | None] = []
    slack = 0.0
    for side, weight in (("A", site.a), ("B", site.b)):
        gradient = None if weight.grad is None else site.part_of(shards.whole(weight.grad).detach(), side)
        if gradient is None or not gradient.any():  # cleared without set_to_none, it is all zeros
            products.append(None)
            continue
        w, g = site.part_of(shards.whole(weight).detach(), side).float(), gradient.float()
        products.append(float((w * g).sum()))
        coarsest = max(rounding, torch.finfo(weight.dtype).eps)
        slack = max(slack, 4 * coarsest * float((w * g).norm()), 8 * _FP32_EPS * float(w.norm() * g.norm()))
    tap_inner = None if inner is None else float(inner)
    return SiteReport(site.name, fired, tap_inner, products[0], products[1], "ok"), slack


def _judge(report: SiteReport, slack: float, common: float, compare: bool) -> SiteReport:
    """The report with its status.

    Args:
        report: of one site.
        slack: the rounding error to expect.
        common: gradients' amounts over taps' amounts, the median over all sites.
        compare: whether the amounts can be compared.
    """
    values = (report.name, report.fired, report.tap_inner, report.a_inner, report.b_inner)
    if report.a_inner is None and report.b_inner is None:
        return SiteReport(*values, "unused")
    if report.fired == 0:
        return SiteReport(*values, "silent")
    tap, a_inner = report.tap_inner, report.a_inner
    if not compare or not tap or a_inner is None or not (math.isfinite(tap) and math.isfinite(a_inner)):
        return SiteReport(*values, "unknown")
    tolerance = RELATIVE_TOLERANCE * max(abs(common * tap), abs(a_inner)) + slack
    return SiteReport(*values, "ok" if abs(a_inner - common * tap) <= tolerance else "mismatch")


class TapWatch:
    """Compares taps and gradients in the first steps, until all sites have been seen to agree.

    Attributes:
        steps_left: how many more steps with gradients are looked at.
    """

    def __init__(self) -> None:
        self.steps_left = CHECKED_STEPS
        self._idle = 0
        self._suspects: set[tuple[str, str]] = set()
        self._quiet: dict[str, int] = {}

    def stop(self) -> None:
        """Look at no more steps."""
        self.steps_left = 0

    def look(self, report: Callable[[], list[SiteReport]]) -> list[SiteReport]:
        """Judge one step, and return the reports of the sites whose taps do not see what they should.

        One step alone does not count. Somebody may have set other gradients than were accumulated, as
        gradient surgery does, or the first of them were there before the taps.

        Args:
            report: makes the step's reports; called only while steps are left.
        """
        if self.steps_left == 0:
            return []
        reports = report()
        if not reports:  # no pair is trained yet
            return []
        if all(r.status == "unused" for r in reports):
            self._idle += 1
            if self._idle == CHECKED_STEPS:
                _warn_of_idleness(CHECKED_STEPS, len(reports))
            return []
        self._idle = 0
        self.steps_left -= 1
        if all(r.status in ("ok", "gradients") for r in reports):
            self.steps_left = 0
        before = self._suspects
        self._suspects = {(r.name, r.status) for r in reports if r.status in ("silent", "mismatch")}
        found = [r for r in reports if (r.name, r.status) in before & self._suspects]
        if self._suspects and not found:
            self.steps_left = max(self.steps_left, 1)
        return found

    def notice(self, quiet: Collection[str]) -> None:
        """Look again where taps have become silent since.

        A gradient of zeros may be the reason, and reading it waits for the device. So a site that is silent
        in every step is looked at after 2, 4, 8, … steps.

        Args:
            quiet: names of the sites that have gradients, and whose taps did not fire in this step.
        """
        self._quiet = {name: self._quiet.get(name, 0) + 1 for name in quiet}
        if any(steps & (steps - 1) == 0 for steps in self._quiet.values() if steps > 1):
            self.steps_left = max(self.steps_left, 2)

    def state_dict(self) -> dict[str, Any]:
        """What the latest steps have shown of single sites."""
        return {"suspects": sorted(map(list, self._suspects)), "quiet": dict(self._quiet)}

    @staticmethod
    def saved_fields() -> Fields:
        """What a checkpoint may hold under the names of :meth:`state_dict`."""
        return {"suspects": several(several(some_text, 2)), "quiet": by_name(whole(1))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, and look at the first steps after it again."""
        self._suspects = {(name, status) for name, status in state.get("suspects", ())}
        self._quiet = dict(state.get("quiet", {}))
        self.steps_left = CHECKED_STEPS


def by_status(reports: Iterable[SiteReport]) -> dict[str, list[str]]:
    """Names of sites by their status."""
    found: dict[str, list[str]] = {}
    for report in reports:
        found.setdefault(report.status, []).append(report.name)
    return found


def warn_of(reports: Iterable[SiteReport]) -> None:
    """Warn of the sites whose taps do not see what their gradients are made of, and name the remedy."""
    names = by_status(reports)
    if "silent" in names:
        warn(
            f"GRIT does nothing for {_sites(names['silent'])}: their weights receive gradients, but the "
            "forward pass of `lora_A` is never called. A fused kernel (Unsloth, Axolotl), a merged adapter "
            "or a model compiled before the optimizer was built goes around it, or the gradients were set by "
            "hand (from torch.autograd.grad) and not accumulated by backward(). Leave out capture='taps', so "
            "that their curvature comes from their gradients, or turn the fused kernels off",
        )
    if "mismatch" in names:
        warn(
            f"the taps of {_sites(names['mismatch'])} do not see what their gradients come from (⟨A, "
            "∇A⟩ differs from Σ h·δ), so GRIT's factors for them are wrong. Part of the forward passes goes "
            "around `lora_A`, the loss has a term in the weights themselves, or gradients were left from "
            "before. Call check_capture() after backward() to see the amounts, or leave out capture='taps'",
        )


def tell_of(reports: Iterable[SiteReport]) -> None:
    """Say which sites' curvature comes from their gradients from now on, and why."""
    names = by_status(reports)
    if "silent" in names:
        tell(
            f"GRIT takes the curvature of {_sites(names['silent'])} from their gradients: `lora_A` is not "
            "called there, as under fused kernels and where the adapter is merged"
        )
    if "mismatch" in names:
        tell(
            f"GRIT takes the curvature of {_sites(names['mismatch'])} from their gradients, which come from "
            "more than the calls of `lora_A`: some go around it, or the loss has a term in the weights"
        )


def _warn_of_idleness(steps: int, sites: int) -> None:
    """Warn that the steps so far had nothing to train."""
    warn(
        f"GritOptimizer.step() was called {steps} times, and none of its {sites} LoRA site(s) had a "
        "gradient, so it trains nothing. Either the model that is trained is not the one that the optimizer "
        "was built on (a copy, or one that the trainer built or wrapped anew), or its adapter is disabled "
        "or frozen. Build the optimizer on the model that is trained. Where transformers' Trainer builds "
        "that model, pass optimizer_cls_and_kwargs=(grit_optim.for_trainer, {...})",
    )


def _sites(names: list[str]) -> str:
    return f"{len(names)} site(s) ({listed(names)})"
