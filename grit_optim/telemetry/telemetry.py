"""Report on a run: totals on request, records to sinks, and the final ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grit_optim.base.settings import group_by_parameter
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.linalg import full_precision
from grit_optim.options.checks import whole
from grit_optim.options.declared import MODALITIES
from grit_optim.parts import Parts
from grit_optim.preconditioners.held_gradients import Outcome
from grit_optim.rank.report import known
from grit_optim.sinks import JsonLines, Record
from grit_optim.telemetry.recorder import Contents, Recorder
from grit_optim.telemetry.snapshot import Snapshot

FORMAT = 1
"""Version of the records, in each start record."""


class Telemetry:
    """Reports on the parts of an optimizer, and changes nothing of them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._recorders: list[Recorder] = []
        self._begun = time.time()

    # ---------------------------------------------------------------- on request

    @full_precision()
    def report(self, per_site: bool) -> dict[str, Any]:
        """Totals so far as plain values; see :meth:`GritOptimizer.telemetry`."""
        parts = self._parts
        ranks, buckets = parts.as_settled()
        told = {
            "options": parts.options.as_dict(),
            "steps": parts.schedule.steps,
            "sites": len(parts.sites.all),
            "refreshes": parts.preconditioning.refreshes,
            "reprojections": parts.ranks.reprojections,
            "folds": parts.curvature.folds,
            "dropped_folds": int(parts.curvature.dropped_folds),
            "sites_by_gradients": len(parts.capture.by_gradients),
            "engaged_sites": sum(int(c.engaged.sum()) for c in buckets),
            "samples": {
                name: int(n)
                for c in buckets
                for name, n in zip(c.bucket.names(), c.factors.activation_samples.tolist(), strict=True)
            },
            "mean_cosine": _mean_cosine(parts.preconditioning.outcomes),
            "predicted_cost": known(sum(ranks.dropped().values())),
            "ranks": ranks.by_name(),
            "stage_seconds": dict(parts.times.seconds),
            **self._in_force(),
        }
        if parts_of := _modalities(buckets):
            told["modalities"] = parts_of
        if per_site:
            told["per_site"] = self._per_site(buckets)
        return told

    def _in_force(self) -> dict[str, Any]:
        """Periods (steps) and damping in force, as the adaptive schedule has set them."""
        schedule, damping = self._parts.schedule, self._parts.options.curvature.kfac_damping
        assert damping is not None  # the mode has said
        return {**schedule.in_force(), "kfac_damping": damping * schedule.damping_scale}

    def _per_site(self, buckets: Sequence[BucketCurvature]) -> dict[str, dict[str, Any]]:
        """Each site's numbers now, with the whole spectrum of both factors."""
        snapshot = Snapshot(buckets, self._parts.preconditioning.outcomes, {})
        columns = snapshot.columns(top_eigenvalues=max((c.bucket.rank for c in buckets), default=0))
        told = {
            name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(snapshot.names)
        }
        for site in (site for c in buckets for site in c.bucket.sites if site.modality is not None):
            told[site.name]["modality"] = site.modality
        return told

    @full_precision()
    def final_ranks(self, path: str | Path | None = None) -> dict[str, dict[str, Any]]:
        """Ranks and parameter counts per site, by name; see :meth:`GritOptimizer.final_ranks`."""
        ranks, buckets = self._parts.as_settled()
        snapshot = Snapshot(buckets, [], {})
        columns = snapshot.columns()
        both = zip(columns["effective_rank_a"], columns["effective_rank_g"], strict=True)
        effective = dict(zip(snapshot.names, both, strict=True))
        final = {}
        for name, kept in ranks.by_name().items():
            origin, (rank_a, rank_g) = ranks.origin[name], effective.get(name, (None, None))
            final[name] = {
                "base_r": origin.rank,
                "final_k_a": kept,
                "final_k_b": kept,
                "effective_rank_a": rank_a,
                "effective_rank_g": rank_g,
                "parameters": origin.parameters,
                "parameters_kept": origin.parameters // origin.rank * kept,
            }
        if path is not None:
            totals = {
                name: sum(f[name] for f in final.values()) for name in ("parameters", "parameters_kept")
            }
            Path(path).write_text(json.dumps({**totals, "sites": final}, indent=1) + "\n", encoding="utf8")
        return final

    # ---------------------------------------------------------------- as it happens

    def log_to(self, sink: str | Path | Callable[[Record], object], every: int, contents: Contents) -> None:
        """Record from now on; see :meth:`GritOptimizer.log_to`."""
        whole(1)("every", every)
        if not (isinstance(sink, str | Path) or callable(sink)):
            raise TypeError(
                f"a sink is a path or something that can be called with a record, got {type(sink).__name__}"
            )
        recorder = Recorder(JsonLines(sink) if isinstance(sink, str | Path) else sink, every, contents)
        self._parts.losses.attach(self._parts.sites.model)
        recorder.write(self._start_record())
        self._recorders.append(recorder)

    def record(self, loss: Tensor | float | None) -> None:
        """Record the step just counted, for the sinks that are due."""
        if not self._recorders:
            return
        with self._parts.times("record"):
            due = [recorder for recorder in self._recorders if recorder.due(self._parts.schedule.steps)]
            taken = self._step_record(loss) if due else None
            for recorder in self._recorders:
                if taken is not None and recorder in due:
                    recorder.submit(*taken)
                else:
                    recorder.drain(wait=False)

    @full_precision()
    def finish(self) -> None:
        """Write what is pending, the latest step and the final ranks, and close the sinks."""
        recorders, self._recorders = self._recorders, []
        if not self._parts.follows_loss:
            self._parts.losses.detach()
        with ExitStack() as all_of_them:  # also those after one that raises
            for recorder in reversed(recorders):
                all_of_them.callback(self._finish, recorder)

    def _finish(self, recorder: Recorder) -> None:
        """Write what one sink lacks, and close it."""
        steps = self._parts.schedule.steps
        try:
            if steps and recorder.last_step != steps:
                recorder.submit(*self._step_record(None))
        finally:
            recorder.close({"kind": "end", "step": steps, "final": self.final_ranks()})

    def _start_record(self) -> Record:
        """Options and sites, for the head of a run."""
        parts = self._parts
        sites = [site for curvature in parts.curvature.buckets for site in curvature.bucket.sites]
        return {
            "kind": "start",
            "format": FORMAT,
            "step": parts.schedule.steps,
            "options": parts.options.as_dict(),
            "base": type(parts.base).__name__,
            "sites": [
                {
                    "name": s.name,
                    "adapter": s.adapter,
                    "rank": s.rank,
                    "parameters": s.parameters,
                    **({} if s.modality is None else {"modality": s.modality}),
                }
                for s in sites
                if not s.deleted
            ],
        }

    def _rate(self) -> float | Tensor | None:
        """The learning rate of the first pair; of the base's first group where it holds none."""
        base, sites = self._parts.base, self._parts.sites.present()
        settings = group_by_parameter(base)
        of_pairs = (settings[id(site.a)] for site in sites if id(site.a) in settings)
        group = next(of_pairs, None) or next(iter(base.param_groups), {})
        return group.get("lr")

    def _step_record(self, loss: Tensor | float | None) -> tuple[Record, Snapshot]:
        """What the host knows of the latest step, and a snapshot of what the device knows."""
        parts, buckets = self._parts, self._parts.curvature.buckets
        engaged = [c.engaged.sum() for c in buckets]
        scalars = {
            "loss": loss,
            "lr": self._rate(),
            "engaged_sites": torch.stack([e.to(engaged[0].device) for e in engaged]).sum() if engaged else 0,
            "dropped_folds": parts.curvature.dropped_folds,
            "predicted_cost": parts.ranks.predicted_cost(),
        }
        outcomes = parts.preconditioning.outcomes or _gradient_norms(buckets)
        record = {
            "kind": "step",
            "step": parts.schedule.steps,
            "seconds": round(time.time() - self._begun, 3),
            "refreshes": parts.preconditioning.refreshes,
            "reprojections": parts.ranks.reprojections,
            "stage_seconds": {name: round(seconds, 4) for name, seconds in parts.times.seconds.items()},
            **self._in_force(),
        }
        return record, Snapshot(buckets, outcomes, scalars)


def _modalities(buckets: Sequence[BucketCurvature]) -> dict[str, dict[str, int]]:
    """Pairs, pairs whose curvature is in force, and directions kept, by modality."""
    found: dict[str, dict[str, int]] = {}
    for curvature in buckets:
        numbers = curvature.engaged.tolist(), curvature.ranks.rank.tolist()
        for site, engaged, rank in zip(curvature.bucket.sites, *numbers, strict=True):
            if site.modality is not None:
                part = found.setdefault(site.modality, {"sites": 0, "engaged_sites": 0, "ranks": 0})
                part["sites"], part["ranks"] = part["sites"] + 1, part["ranks"] + rank
                part["engaged_sites"] += int(engaged)
    return {modality: found[modality] for modality in MODALITIES if modality in found}


def _mean_cosine(outcomes: Sequence[Outcome]) -> float | None:
    """Mean cosine over all matrices whose update is known with and without curvature; None without any."""
    cosines = [o.cosine for o in outcomes if o.cosine is not None]
    if not cosines:
        return None
    value = float(torch.cat([c.detach().float().cpu().flatten() for c in cosines]).nanmean())
    return None if value != value else value


def _gradient_norms(buckets: Sequence[BucketCurvature]) -> list[Outcome]:
    """‖∇‖ per matrix, where no mode or penalty has stacked the gradients."""
    found = []
    for i, curvature in enumerate(buckets):
        for group in curvature.bucket.groups:
            if (part := group.with_gradient()) is not None:
                norms = torch.linalg.matrix_norm(part.stack(part.gradients()))
                found.append(Outcome(i, part.side, part.positions, norms))
    return found
