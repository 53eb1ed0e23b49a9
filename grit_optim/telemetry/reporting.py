"""What GritOptimizer tells: telemetry on request, records to sinks, and the final ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_optim.capture.losses import Losses
from grit_optim.lora.discovery import Site
from grit_optim.rank.budget import Origin
from grit_optim.rank.ranked import RankedOptimizer
from grit_optim.sinks import JsonLines, Record
from grit_optim.telemetry.counters import Outcome
from grit_optim.telemetry.recorder import Contents, Recorder, check_count
from grit_optim.telemetry.snapshot import Snapshot

FORMAT = 1
"""Version of the records."""


class ReportingOptimizer(RankedOptimizer):
    """The stages of a step, and what can be learnt of them."""

    def _start(self, base: Optimizer, sites: list[Site], origin: dict[str, Origin] | None = None) -> None:
        super()._start(base, sites, origin)
        self._losses = Losses()
        self._recorders: list[Recorder] = []
        self._begun = time.time()
        if self._needs_losses():
            self._losses.attach(self._watched_model())

    def _needs_losses(self) -> bool:
        """Whether a schedule follows the loss."""
        return self.options.adaptive_schedule or self.options.rank_budget_schedule == "adaptive"

    def telemetry(self, per_site: bool = True) -> dict[str, Any]:
        """What has been done so far, as plain values (reading them waits for the device).

        ``predicted_cost`` is the rise of the loss that all given-up ranks were predicted to cost, in the
        loss's unit. ``mean_cosine`` is that of the angle between the latest update with and without
        curvature, over all matrices: 1 means that the curvature changed nothing. None where only the one with
        curvature is known ("eigenbasis", "balanced").

        Args:
            per_site: also each site's own numbers under ``"per_site"``, by name: see docs/telemetry.md.
        """
        counters = self._counters
        told = {
            "options": self.options.as_dict(),
            "steps": self._steps,
            "sites": len(self._sites),
            "refreshes": counters.refreshes,
            "reprojections": counters.reprojections,
            "folds": counters.folds,
            "dropped_folds": int(counters.dropped),
            "engaged_sites": sum(int((c.a_ready & c.b_ready).sum()) for c in self._curvatures),
            "samples": {
                name: int(n)
                for c in self._curvatures
                for name, n in zip(c.bucket.names(), c.factors.activation_samples.tolist(), strict=True)
            },
            "mean_cosine": counters.mean_cosine(),
            "predicted_cost": sum(self._dropped().values()),
            "ranks": self._kept(),
            "stage_seconds": self.stage_seconds(),
            **self._pace.state(),
        }
        if per_site:
            told["per_site"] = self._site_telemetry()
        return told

    def _site_telemetry(self) -> dict[str, dict[str, Any]]:
        """Every site's own numbers now, with the whole spectrum of both factors."""
        snapshot = Snapshot(self._curvatures, self._counters.outcomes, {})
        columns = snapshot.columns(top_eigenvalues=max((c.bucket.rank for c in self._curvatures), default=0))
        return {
            name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(snapshot.names)
        }

    def stage_seconds(self) -> dict[str, float]:
        """Host seconds spent in each stage since construction."""
        return dict(self._times.seconds)

    def final_ranks(self, path: str | Path | None = None) -> dict[str, dict[str, Any]]:
        """Ranks and parameter counts per site, by name, as the tables of a paper need them.

        Each has ``base_r`` (the adapter's rank), ``final_k_a`` and ``final_k_b`` (directions that A and B
        keep), ``effective_rank_a`` and ``effective_rank_g`` of both factors, ``parameters`` and
        ``parameters_kept``.

        Args:
            path: also write them there as JSON, with the totals.
        """
        snapshot = Snapshot(self._curvatures, [], {})
        columns = snapshot.columns()
        effective = dict(
            zip(
                snapshot.names,
                zip(columns["effective_rank_a"], columns["effective_rank_g"], strict=True),
                strict=True,
            )
        )
        final = {}
        for name, kept in self._kept().items():
            origin, (rank_a, rank_g) = self._origin[name], effective.get(name, (None, None))
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

    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the coming step; several calls before a step are averaged. A tensor is not read back here.

        Not needed where the model's output carries a ``loss`` or ``step`` gets a closure. A copied or
        unpickled optimizer knows its pairs but not the model, and so needs one or the other.

        Args:
            loss: a number, or a tensor of one value.
        """
        self._losses.observe(loss)

    def log_to(
        self,
        sink: str | Path | Callable[[Record], object],
        *,
        every: int = 10,
        log_fisher_spectrum: bool = False,
        log_top_eigs: int = 8,
        log_eig_heatmaps: bool = False,
        log_eig_heatmaps_modules: int = 6,
    ) -> None:
        """Record from now on, until :meth:`finish_logging` or :meth:`close`. Sinks are not saved or copied.

        Args:
            sink: a path for a file of JSON lines (``python -m grit_optim plot`` and ``watch`` read it), a
                ``grit_optim.sinks.TensorBoard`` or ``WandB``, or any callable that takes a dict.
            every: steps between two records; the first step has one too.
            log_fisher_spectrum: also the leading eigenvalues of both factors.
            log_top_eigs: how many of them.
            log_eig_heatmaps: also the eigenvectors of both factors.
            log_eig_heatmaps_modules: for how many of the first sites.

        Raises:
            TypeError: ``sink`` is no path and cannot be called, or an option has the wrong type.
        """
        check_count("every", every)
        contents = Contents(log_fisher_spectrum, log_top_eigs, log_eig_heatmaps, log_eig_heatmaps_modules)
        if not (isinstance(sink, str | Path) or callable(sink)):
            raise TypeError(
                f"a sink is a path or something that can be called with a record, got {type(sink).__name__}"
            )
        recorder = Recorder(JsonLines(sink) if isinstance(sink, str | Path) else sink, every, contents)
        self._losses.attach(self._watched_model())
        recorder.write(self._start_record())
        self._recorders.append(recorder)

    def finish_logging(self) -> None:
        """Write what is pending, the latest step and the final ranks, and close the sinks."""
        recorders, self._recorders = self._recorders, []
        if not self._needs_losses():
            self._losses.detach()
        for recorder in recorders:
            if self._steps and recorder.last_step != self._steps:
                recorder.submit(*self._step_record(None))
            recorder.close({"kind": "end", "step": self._steps, "final": self.final_ranks()})

    def _record(self, loss: Tensor | float | None) -> None:
        """Stage 6, where a sink wants this step; ``self._steps`` counts it already."""
        if not self._recorders:
            return
        with self._times("record"):
            due = [recorder for recorder in self._recorders if recorder.due(self._steps)]
            taken = self._step_record(loss) if due else None
            for recorder in self._recorders:
                if taken is not None and recorder in due:
                    recorder.submit(*taken)
                else:
                    recorder.drain(wait=False)

    def _predicted_cost(self) -> Tensor | float:
        """What all given-up ranks were predicted to cost, not read back from the device."""
        gone = sum(self._removed.values())
        dropped = [curvature.dropped.sum() for curvature in self._curvatures]
        return torch.stack([d.to(dropped[0].device) for d in dropped]).sum() + gone if dropped else gone

    def _start_record(self) -> Record:
        sites = [site for curvature in self._curvatures for site in curvature.bucket.sites]
        return {
            "kind": "start",
            "format": FORMAT,
            "step": self._steps,
            "options": self.options.as_dict(),
            "base": type(self.base).__name__,
            "sites": [
                {
                    "name": s.name,
                    "adapter": s.adapter,
                    "rank": s.rank,
                    "parameters": s.a.numel() + s.b.numel(),
                }
                for s in sites
            ],
        }

    def _step_record(self, loss: Tensor | float | None) -> tuple[Record, Snapshot]:
        counters = self._counters
        engaged = [(c.a_ready & c.b_ready).sum() for c in self._curvatures]
        scalars = {
            "loss": loss,
            "lr": self.base.param_groups[0]["lr"],
            "engaged_sites": torch.stack([e.to(engaged[0].device) for e in engaged]).sum() if engaged else 0,
            "dropped_folds": counters.dropped,
            "predicted_cost": self._predicted_cost(),
        }
        outcomes = counters.outcomes or _gradient_norms(self)
        record = {
            "kind": "step",
            "step": self._steps,
            "seconds": round(time.time() - self._begun, 3),
            "refreshes": counters.refreshes,
            "reprojections": counters.reprojections,
            "stage_seconds": {name: round(seconds, 4) for name, seconds in self.stage_seconds().items()},
            **self._pace.state(),
        }
        return record, Snapshot(self._curvatures, outcomes, scalars)


def _gradient_norms(optimizer: ReportingOptimizer) -> list[Outcome]:
    """‖∇‖ per matrix, for the modes that never stack the gradients."""
    found = []
    for i, curvature in enumerate(optimizer._curvatures):
        for group in curvature.bucket.groups:
            if (part := group.with_gradient()) is not None:
                norms = torch.linalg.matrix_norm(part.stack(part.gradients()))
                found.append(Outcome(i, part.side, part.positions, norms))
    return found
