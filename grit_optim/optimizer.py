"""GritOptimizer: a torch optimizer that knows the curvature of the LoRA adapters it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import cleandoc
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.base.checks import check_base
from grit_optim.base.wrapper import OptimizerWrapper, evaluate
from grit_optim.capture.diagnosis import SiteReport
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.export.shrink import shrink
from grit_optim.export.trained import save_trained, warn_of_ranks_that_stay
from grit_optim.linalg import full_precision
from grit_optim.lora.by_modality import ModalityOf
from grit_optim.lora.site import Site
from grit_optim.lora.site_set import SiteSet, check_model
from grit_optim.options import DECLARED
from grit_optim.options.documentation import arguments
from grit_optim.parts import KEY, Parts
from grit_optim.preconditioners.resolution import resolve
from grit_optim.processes.group import AUTO
from grit_optim.rank.origin import Origin, origins_of
from grit_optim.rank.plan import make_plan
from grit_optim.rank.report import RankReport
from grit_optim.sinks import Record
from grit_optim.telemetry.recorder import Contents
from grit_optim.telemetry.telemetry import Telemetry


class GritOptimizer(OptimizerWrapper):
    """A base optimizer that sees the rank-space Fisher information of the LoRA pairs it trains.

    Parameters that belong to no pair go to the base untouched. ``param_groups``, ``state`` and ``defaults``
    are the base's own. Where several processes train together (DDP), each of them calls :meth:`step` and
    whatever else changes the model.

    Args:
        base: any ``torch.optim.Optimizer`` except LBFGS, built on the model's trainable parameters.
        model: the PEFT model, or one that contains such layers, several models in one ``nn.ModuleList`` too.
            It is kept alive. A pair that the base holds but that is frozen is tapped once it is trained.
        sites: the pairs, where PEFT does not hold them: ``[Site.from_modules(name, a, b, scaling), …]``, or
            ``Site.from_parameters`` where no module does.
        modality_of: a pair's modality ("vision", "audio", "cross_modal", "text") where the model's structure
            does not show it: a function of its name, or a mapping, as ``{"vision_tower": "vision"}``.
        process_group: whose tokens count: those of a group's processes, or None: of this process alone.
            "auto": of those that the model is wrapped for by DDP or FSDP2; a bare one is trained alone.

        {options}

    Raises:
        TypeError: ``base`` is no optimizer or cannot be wrapped, or an option has the wrong type or name.
        ValueError: an option is out of range, or ``base`` holds no LoRA pair of ``model``, trained or not.

    Example:
        >>> optimizer = GritOptimizer(torch.optim.AdamW(parameters, lr=2e-4), model)  # doctest: +SKIP
    """

    state_key = KEY

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        *,
        sites: Sequence[Site] | None = None,
        modality_of: ModalityOf | None = None,
        process_group: Any = AUTO,
        precondition: str = "spectral",
        kfac_power: float | None = None,
        direction_momentum: float | str | None = None,
        step_length: float | str | None = None,
        max_grad_norm: float | None = None,
        fisher: str = "kfac",
        pairing: str = "kfac",
        fisher_decay: float | None = 0.9,
        modality_weights: str | Mapping[str, float] | None = None,
        kfac_min_samples: int = 64,
        kfac_damping: float | None = None,
        damping: str = "relative",
        kfac_inversion_device: str | None = None,
        capture: str = "auto",
        cov_update_freq: int = 1,
        max_tokens: int | None = 1024,
        kfac_update_freq: int | None = None,
        ng_warmup_steps: int = 0,
        reprojection_freq: int = 50,
        reprojection_warmup_steps: int = 0,
        adaptive_schedule: bool = False,
        reprojection: str = "none",
        reprojection_k: int | None = None,
        rank_adaptation_threshold: float | None = None,
        min_lora_rank: int = 4,
        rank_adaptation_start_step: int = 0,
        rank_budget: float | tuple[float, float] | Mapping[str, Any] | str | None = None,
        effective_rank_factor: float = 1.2,
        rank_budget_schedule: str = "linear",
        rank_budget_steps: int = 0,
        lambda_kfac: float = 0.0,
        lambda_reproj: float = 0.0,
        regularizer_warmup_steps: int = 0,
        **former: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in DECLARED}
        check_base(base)
        options = resolve(given, former, base)
        taps_only, moves = options.recording.taps_only, options.ranks.moves
        found = SiteSet(base, check_model(model), sites, taps_only, moves, modality_of)
        first = found.first(model)
        self._assemble(Parts(base, options, found, process_group), first)

    def _assemble(self, parts: Parts, sites: list[Site], origin: Mapping[str, Origin] | None = None) -> None:
        """Work on these pairs with these parts, at construction and in a copy."""
        self.options, self._parts = parts.options, parts
        self._telemetry = Telemetry(self._parts)
        self._closed = False
        self._wrap(parts.base, parts)
        try:
            parts.start(sites, origin)
            warn_of_ranks_that_stay(parts)
        except BaseException:  # also a warning that is an error; the model is as it was
            parts.close()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, with curvature; returns what the closure returned.

        Args:
            closure: runs zero_grad, forward and backward, returns the loss; run once, with gradients enabled.

        Raises:
            NotImplementedError: a pair's weights are partitioned over processes (FSDP1, ZeRO-3).
            RuntimeError: the optimizer was closed.
        """
        if self._closed:
            raise RuntimeError("this GritOptimizer was closed; go on with its base, or build a new one")
        parts = self._parts
        returned = evaluate(closure)
        self._tell_join()
        with full_precision() as as_called:  # the caller's autocast is for the base alone
            parts.follow_model()
            loss = parts.take_loss(returned)
            statistics = parts.capture.collect()  # None: no backward pass, and nothing of GRIT's advances
            if statistics is not None:
                parts.curvature.fold(statistics)
            parts.follow_groups()  # not before: new taps forget what the old ones gathered
            if statistics is not None:
                parts.refresh_if_due()
            parts.preconditioning.step(parts.curvature, parts.schedule, as_called)
            parts.ranks.clear_given_up(parts.curvature.buckets)
            if statistics is not None:
                parts.reproject_if_due()
                parts.end_step(loss)
                self._telemetry.record(loss)
        return returned

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what the taps gathered with them."""
        super().zero_grad(set_to_none)
        with full_precision():
            self._parts.capture.discard()

    def close(self) -> None:
        """Remove every hook, end the logging, and leave the base with plain moments: it can go on alone."""
        if self._closed:
            return
        try:
            self.finish_logging()
        finally:
            self._parts.to_plain_coordinates()
            self._parts.close()
            self._closed = True

    def __repr__(self) -> str:
        mode, sites = self.options.preconditioning.precondition, len(self._parts.sites.all)
        return f"GritOptimizer(precondition={mode!r}, sites={sites}, base={self.base!r})"

    def __getstate__(self) -> dict[str, Any]:
        own, sites = {"options": self.options, KEY: self._parts.state_dict()}, self._parts.sites
        own["process_group"] = self._parts.processes.kept
        return {**own, "base": self.base, "sites": sites.present(), "given_sites": sites.given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The copy knows its pairs; the model they came from is not copied along.
        base, sites = state["base"], state["sites"]
        found = SiteSet(base, None, sites if state["given_sites"] else None)
        group = state["process_group"].given if "process_group" in state else AUTO
        self._assemble(Parts(base, state["options"], found, group), sites, origins_of(state[KEY]))
        self._parts.load_state_dict(state[KEY])

    def check_capture(self) -> list[SiteReport]:
        """Whether the taps see what the gradients saw, per site; between ``backward()`` and :meth:`step`.

        Compares ⟨A, ∇A⟩, ⟨B, ∇B⟩ and Σ h·δ, equal up to the loss scale and clipping; across processes in the
        first steps only. Runs by itself in those. Reads values from the device.
        """
        return self._parts.capture.check()

    @property
    def curvature(self) -> list[BucketCurvature]:
        """The factors and operators of all pairs, one entry per rank and device: to read, not to write."""
        return self._parts.curvature.buckets

    def ranks(self) -> RankReport:
        """Directions kept per site: a dict by name, with all else that is known of each in ``.sites``.

        ``.table()`` is for printing, ``.as_dict()`` for JSON. Reads values from the device. With the paper's
        projections, which let a rank grow back, ranks are what the latest projection left.
        """
        ranks, buckets = self._parts.as_settled()
        return ranks.report(buckets, ranks.by_name(), ranks.coordinates(buckets), {})

    def plan_ranks(self, ranks: float | str | Mapping[str, Any]) -> RankReport:
        """What :meth:`reduce_ranks_` would do, and what that is predicted to cost; changes nothing."""
        known, buckets = self._parts.as_settled()
        plan = make_plan(known, buckets, self.options, ranks)
        kept = {**known.by_name(), **plan.ranks(buckets)}
        return known.report(buckets, kept, plan.found, plan.costs(buckets))

    @torch.no_grad()
    def reduce_ranks_(self, ranks: float | str | Mapping[str, Any]) -> RankReport:
        """Give up ranks now, for good, as the reprojection ``"balanced"`` does; returns what is left.

        Args:
            ranks: a budget as ``rank_budget`` takes it, or site name to rank; other sites keep theirs.

        Raises:
            TypeError: neither a budget nor a mapping.
            ValueError: an unknown site, one that cannot lose directions, a rank above its own, a budget that
                cannot be met, or factors that have seen too few tokens.
        """
        self._parts.reduce(make_plan(*self._parts.as_settled(), self.options, ranks))
        return self.ranks()

    @torch.no_grad()
    def shrink_(self, *, model: nn.Module | None = None) -> RankReport:
        """Cut A, B, their gradients and the base's state to the ranks kept, between two phases.

        What the model computes stays the same. So do the Parameter objects, but for sites of rank 0, which
        leave the model. PEFT's configuration follows. Later checkpoints fit the smaller adapter.

        Args:
            model: the model, where the optimizer does not know it any more (after copying or unpickling).

        Raises:
            ValueError: the paper's projections, which give no rank up, no rank is left, or DoRA.
        """
        shrink(self._parts, model)
        return self.ranks()

    def save_adapter(
        self,
        path: str | PathLike[str],
        *,
        adapter: str | None = None,
        fold_scale: bool = False,
        dtype: torch.dtype | None = None,
        model: nn.Module | None = None,
    ) -> RankReport:
        """Save the adapter with the ranks kept, for ``PeftModel.from_pretrained``; returns the ranks.

        Args:
            path: the folder, with the old adapter or the new one at every moment; of several PeftModels a
                folder for each is in it, by its name in the model (docs/adapters.md).
            adapter: name of the adapter, where this optimizer trains several.
            fold_scale: all layers at one rank, the scale in B: for llama.cpp, vLLM, … (docs/adapters.md).
            dtype: ``torch.bfloat16`` or ``torch.float16`` for half the bytes of fp32; None: as it is.
            model: the model, where the optimizer does not know it any more (after unpickling).

        Raises:
            ValueError: no such adapter, one that this optimizer does not train, one that cannot be exported
                (DoRA), or a value that ``dtype`` cannot hold.
        """
        return save_trained(self._parts, path, adapter, fold_scale, dtype, model)

    def telemetry(self, per_site: bool = True) -> dict[str, Any]:
        """Totals so far and, ``per_site``, each site's own: docs/telemetry.md. Waits for the device."""
        return self._telemetry.report(per_site)

    def stage_seconds(self) -> dict[str, float]:
        """Host seconds spent in each stage since construction."""
        return dict(self._parts.times.seconds)

    def final_ranks(self, path: str | Path | None = None) -> dict[str, dict[str, Any]]:
        """Ranks and parameter counts per site, by name; also in the file ``path``, as JSON."""
        return self._telemetry.final_ranks(path)

    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the coming step, a number or a tensor of one value, which is not read back here.

        Several calls before a step are averaged. Not needed with a closure, or where the model's output has a
        ``loss``. A copy does not know the model.
        """
        self._parts.losses.observe(loss)

    def observe_tokens(self, mask: Tensor) -> None:
        """Tell which tokens of the next forward pass stand for pictures, boolean ``[batch, tokens]``.

        It is for ``modality_weights``. Not needed where the model gets ``input_ids``: its configuration names
        the ids of pictures. The forward pass refuses a mask of another shape than its input's.
        """
        self._parts.capture.tell_tokens(mask)

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
            sink: a path for JSON lines, new or a log that goes on; one of ``grit_optim.sinks``; a callable.
            every: steps between two records; the first step has one too.
            log_fisher_spectrum: also both factors' leading eigenvalues, as many as ``log_top_eigs``.
            log_eig_heatmaps: also both factors' eigenvectors, of ``log_eig_heatmaps_modules`` sites.
            log_top_eigs: how many eigenvalues.
            log_eig_heatmaps_modules: for how many of the first sites.

        Raises:
            TypeError: ``sink`` is no path and cannot be called, or an option has the wrong type.
            OSError, ValueError: the file cannot be written, or is no log.
        """
        contents = Contents(log_fisher_spectrum, log_top_eigs, log_eig_heatmaps, log_eig_heatmaps_modules)
        self._telemetry.log_to(sink, every, contents)

    def finish_logging(self) -> None:
        """Write what is pending, the latest step and the final ranks, and close the sinks."""
        self._telemetry.finish()


GritOptimizer.__doc__ = cleandoc(GritOptimizer.__doc__ or "").replace("    {options}", arguments())
