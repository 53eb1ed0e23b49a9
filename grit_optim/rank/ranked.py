"""What can be asked and done about the ranks between steps: report, plan, reduce, shrink, save."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from grit_optim.curvature import checkpoint
from grit_optim.curvature.bucket import Curvature
from grit_optim.export import peft_config as adapter_config
from grit_optim.export import shrink
from grit_optim.export.adapter import History, export_adapter
from grit_optim.lora.discovery import layers_of_pairs, peft_model_in
from grit_optim.lora.sites import TappingOptimizer
from grit_optim.messages import warn
from grit_optim.options import PAPER_PROJECTIONS, check_budget_value, listed
from grit_optim.presets import BALANCING_DAMPING
from grit_optim.rank import budget, pairs
from grit_optim.rank.budget import Origin
from grit_optim.rank.coordinates import Coordinates
from grit_optim.rank.report import RankReport, SiteRank, effective_ranks


class RankedOptimizer(TappingOptimizer):
    """A staged optimizer with what its users can see of the ranks, and do to them."""

    def _tell_budget(self, loss: Tensor | float | None) -> None:
        """Hand the loss of a step, where it is known, to a budget that follows it."""
        if loss is not None and self._budget is not None and self._budget.kind == "adaptive":
            self._budget.observe(loss)

    # ---------------------------------------------------------------- what is known

    def ranks(self) -> RankReport:
        """Directions kept per site, a dict by name, with effective ranks, parameters and predicted losses in ``.sites``.

        ``print(optimizer.ranks().table())`` shows it, ``.as_dict()`` is for JSON. Reads values from the
        device. The paper's projections let a rank grow back until they are next due; with them, ranks and
        parameters are what the latest one left.
        """
        return self._report(self._kept(), self._coordinates(), {})

    def plan_ranks(self, ranks: float | Mapping[str, int]) -> RankReport:
        """What :meth:`reduce_ranks_` would do, and the rise of the loss that it is predicted to cost; nothing is changed.

        Args:
            ranks: a budget as ``rank_budget`` takes it, or site name to rank (sites that are not named keep
                theirs).
        """
        found, wanted = self._planned(ranks)
        costs = {
            name: cost
            for c, f, w in zip(self._curvatures, found, wanted, strict=True)
            for name, cost in zip(c.bucket.names(), _cost(c, f, w).tolist(), strict=True)
        }
        kept = {
            n: k
            for c, w in zip(self._curvatures, wanted, strict=True)
            for n, k in zip(c.bucket.names(), w.tolist(), strict=True)
        }
        return self._report({**self._kept(), **kept}, found, costs)

    @torch.no_grad()
    def reduce_ranks_(self, ranks: float | Mapping[str, int]) -> RankReport:
        """Give up ranks now, for good, as the reprojection ``"balanced"`` does.

        Args:
            ranks: a budget as ``rank_budget`` takes it, or site name to rank (sites that are not named keep
                theirs).

        Returns:
            The ranks, with the rise of the loss that all that was dropped was predicted to cost.

        Raises:
            TypeError: neither a budget nor a mapping.
            ValueError: an unknown site, a rank above the site's, a budget that cannot be met, or factors that
                have not seen ``kfac_min_samples`` tokens yet.
        """
        found, wanted = self._planned(ranks)
        for curvature in self._curvatures:
            self._mode.to_plain_coordinates(curvature)
        self._truncate(found, wanted)
        self._reduced = True
        return self.ranks()

    def _kept(self) -> dict[str, int]:
        """Directions kept, by site; sites that :meth:`shrink_` took out come last, with 0."""
        pairs.settle_ranks(self._curvatures)
        kept = {
            name: rank
            for curvature in self._curvatures
            for name, rank in zip(curvature.bucket.names(), curvature.rank.tolist(), strict=True)
        }
        return {**kept, **dict.fromkeys(self._removed, 0)}

    def _dropped(self) -> dict[str, float]:
        """Predicted rise of the loss by what was given up so far, by site."""
        return self._removed | {
            name: cost
            for curvature in self._curvatures
            for name, cost in zip(curvature.bucket.names(), curvature.dropped.tolist(), strict=True)
        }

    def _coordinates(self) -> list[Coordinates]:
        pairs.settle_ranks(self._curvatures)
        return [pairs.coordinates(curvature, BALANCING_DAMPING) for curvature in self._curvatures]

    def _report(
        self, kept: Mapping[str, int], found: Sequence[Coordinates], costs: Mapping[str, float]
    ) -> RankReport:
        """All that is known, with ``kept`` directions per site at a further cost of ``costs``."""
        threshold, dropped = self.options.rank_adaptation_threshold, self._dropped()
        effective: dict[str, tuple[float | None, int | None]] = {}
        for c, f in zip(self._curvatures, found, strict=True):
            spectrum = torch.where(f.usable[:, None], f.spectrum, 0.0)
            effective.update(zip(c.bucket.names(), effective_ranks(spectrum, threshold), strict=True))
        sites = []
        for name, origin in self._origin.items():
            if name not in kept:
                continue  # its adapter was replaced or deleted
            rank, size = kept[name], origin.parameters // origin.rank
            loss = dropped[name] + costs.get(name, 0.0)
            entropy, count = effective.get(name, (None, None))
            sites.append(
                SiteRank(name, rank, origin.rank, entropy, count, rank * size, origin.parameters, loss)
            )
        return RankReport(sites, threshold)

    def _planned(self, ranks: float | Mapping[str, int]) -> tuple[list[Coordinates], list[Tensor]]:
        """Balanced coordinates and the ranks to keep in them, ``[S]`` per bucket."""
        if self.options.reprojection in PAPER_PROJECTIONS:
            raise ValueError(
                f"with reprojection={self.options.reprojection!r} no rank is given up for good: every row of A stays in use. "
                "Build the optimizer with reprojection='balanced' or 'none'"
            )
        if self.options.fisher != "kfac":
            raise ValueError(
                f"fisher={self.options.fisher!r} keeps moments of gradients in the coordinates of A and B, which change where "
                "ranks are given up; build the optimizer with fisher='kfac'"
            )
        found = self._coordinates()
        self._check_ready(found)
        if isinstance(ranks, Mapping):
            return found, self._named(ranks)
        check_budget_value("the rank budget", ranks)
        origins = self._origin.values()
        budget.check("the rank budget", ranks, origins, self.options.min_lora_rank)
        total = torch.tensor(budget.parameters(ranks, budget.full_parameters(origins)), dtype=torch.float64)
        return found, self._ranks_within(found, total, regrowth=False)

    def _check_ready(self, found: Sequence[Coordinates]) -> None:
        unready = [
            name
            for c, f in zip(self._curvatures, found, strict=True)
            for name, ready in zip(c.bucket.names(), (f.usable | (c.rank == 0)).tolist(), strict=True)
            if not ready
        ]
        if unready:
            raise ValueError(
                f"nothing is known yet of the curvature of {len(unready)} site(s) ({listed(unready)}), so no loss can be "
                f"predicted: train until each has seen kfac_min_samples={self.options.kfac_min_samples} tokens since B is not "
                "zero. An adapter that was trained elsewhere can be exported as it is with "
                "grit_optim.export_adapter(model, path)"
            )

    def _named(self, ranks: Mapping[str, int]) -> list[Tensor]:
        """The ranks that a mapping asks for, the others as they are."""
        known = self._kept()
        for name, rank in ranks.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(
                    f"unknown site {name!r}; {hint}The {len(known)} sites are the keys of optimizer.ranks(): "
                    f"{listed(list(known), 3)}"
                )
            if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= known[name]:
                raise ValueError(
                    f"site {name!r} has rank {known[name]}; it can keep a whole number from 0 to that, not {rank!r}"
                )
        return [
            torch.tensor([ranks.get(name, known[name]) for name in c.bucket.names()], device=c.rank.device)
            for c in self._curvatures
        ]

    # ---------------------------------------------------------------- smaller tensors

    @torch.no_grad()
    def shrink_(self, *, model: nn.Module | None = None) -> RankReport:
        """Cut A, B, their gradients and the base's state to the ranks that are kept, in place, between training phases.

        What the model computes stays the same. The Parameter objects stay the same too, but for sites of rank
        0, which leave the model and the base's parameter groups. PEFT's configuration is updated, so that
        ``model.save_pretrained`` and :meth:`save_adapter` write what is there. A checkpoint of the optimizer
        from now on belongs to the smaller adapter.

        Args:
            model: the model, where the optimizer does not know it any more (after copying or unpickling).

        Raises:
            ValueError: the paper's projections are in use, which give no rank up, no rank is left, or DoRA.
        """
        if self.options.reprojection in PAPER_PROJECTIONS:
            raise ValueError(
                f"reprojection={self.options.reprojection!r} gives no rank up for good, so there is nothing to shrink"
            )
        peft_model = shrink.check(self._known(model), self._sites)
        for curvature in self._curvatures:
            self._mode.to_plain_coordinates(curvature)
        kept, dropped = self._kept(), self._dropped()
        if not any(kept.values()):
            raise ValueError(
                "no site keeps a direction, so nothing would be left to train; reduce the ranks less"
            )
        known = checkpoint.pack_sites(self._curvatures, with_operators=True)
        # A bias that is trained works at any rank, and needs a pair to hang on.
        sizes = {site.name: max(kept[site.name], int(site.trains_bias)) for site in self._sites}
        gone = [site for site in self._sites if sizes[site.name] == 0]
        shrink.check_starts(self._sites, sizes, peft_model)
        shrink.narrow(self.base, self._sites, sizes, peft_model)
        if peft_model is not None:
            shrink.update_configs(peft_model, gone)
        self._removed.update({site.name: dropped[site.name] for site in gone})
        left = [site for site in self._sites if sizes[site.name] > 0]
        self._attach(
            left, {site.name: checkpoint.narrowed(known[site.name], sizes[site.name]) for site in left}
        )
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
        """Save the trained adapter with the ranks that are kept and no others, for ``PeftModel.from_pretrained``.

        Args:
            path: the folder; it holds the old adapter or the new one at every moment (file by file only,
                where the folder is a mount point, the working directory, or in a folder that must not be
                written to).
            adapter: name of the adapter, where this optimizer trains several.
            fold_scale: multiply the scale into B, for programs that ignore ``alpha_pattern`` and rsLoRA.
            dtype: ``torch.bfloat16`` or ``torch.float16`` for half the bytes of an adapter trained in fp32;
                None: as it is.
            model: the model, where the optimizer does not know it any more (after unpickling).

        Returns:
            The ranks as saved, with effective ranks of ΔW and what the dropped ones were predicted to cost.

        Raises:
            ValueError: no such adapter, one that this optimizer does not train, one that cannot be exported
                (DoRA), or a value that ``dtype`` cannot hold.
        """
        model = self._known(model)
        if model is None:
            raise ValueError(
                "this optimizer no longer knows its model (it was unpickled, or the model is gone); pass model="
            )
        peft_model = peft_model_in(model)
        trained = sorted({site.adapter for site in self._sites})
        if adapter is None and len(trained) == 1:
            adapter = trained[0]
        adapter = adapter_config.choose_adapter(peft_model, adapter)
        if adapter not in trained:
            raise ValueError(
                f"adapter {adapter!r} was trained elsewhere: this optimizer trains {', '.join(map(repr, trained))}. Save it as "
                f"it is with grit_optim.export_adapter(model, path, adapter={adapter!r})"
            )
        history = self._history(peft_model, adapter)
        threshold = self.options.rank_adaptation_threshold
        return export_adapter(
            model,
            path,
            adapter=adapter,
            fold_scale=fold_scale,
            dtype=dtype,
            history=history,
            threshold=threshold,
        )

    def _warn_of_ranks_that_stay(self) -> None:
        """Say at once, and not after the run, that ranks to be given up in training cannot leave the saved adapter."""
        options, model = self.options, self._watched_model()
        gives_up = options.rank_budget is not None or options.enable_rank_adaptation
        if model is None or options.reprojection in PAPER_PROJECTIONS or not gives_up:
            return
        for adapter in sorted({site.adapter for site in self._sites if site.in_peft}):
            try:
                config = peft_model_in(model).peft_config[adapter]
                adapter_config.check_exportable(config, adapter)
                adapter_config.check_start(config, adapter)
            except ValueError as error:
                warn(
                    f"ranks will be given up in training, but save_adapter() and shrink_() will refuse: {error}"
                )

    def _known(self, model: nn.Module | None) -> nn.Module | None:
        """The model given, else the one the optimizer was built with, if it is still there."""
        return model if model is not None or self._model is None else self._model()

    def _history(self, peft_model: Any, adapter: str) -> dict[str, History]:
        """What is known of each site of ``adapter``, by the layer's name in the base model."""
        names, dropped = layers_of_pairs(peft_model.get_base_model()), self._dropped()
        sites = [site for site in self._sites if site.adapter == adapter and id(site.a_modules) in names]
        known = {names[id(site.a_modules)][0]: site.name for site in sites}
        prefix = shrink.common_prefix(known)
        known |= {
            shrink.layer_name(n, prefix, adapter): n for n in self._removed if n.endswith(f".{adapter}")
        }
        return {
            layer: History(self._origin[name].rank, self._origin[name].parameters, dropped[name])
            for layer, name in known.items()
        }

    def _load_ranks(self, own: dict[str, Any]) -> None:
        """Restore what a saved state says of ranks beside the sites' own; ``own`` may be without."""
        self._removed = dict(own.get("removed", {}))
        self._versions = None
        self._budget = None
        if own.get("origin"):
            self._remember([], {name: Origin(*values) for name, values in own["origin"].items()})
        else:
            self._remember(self._sites, {})
        if self._budget is not None:
            self._budget.load(own.get("budget", {}))
        self._forget_ranks_of_the_paper(own)
        self._reduced = any(bool((c.rank < c.bucket.rank).any()) for c in self._curvatures)

    def _forget_ranks_of_the_paper(self, own: dict[str, Any]) -> None:
        """Ranks that the paper's projections left are no ranks given up: all rows are in use, and must not be cleared."""
        now = self.options.reprojection
        before = own.get(
            "reprojection", now if now == "balanced" else PAPER_PROJECTIONS[0]
        )  # not said in older states
        if before in PAPER_PROJECTIONS and now not in PAPER_PROJECTIONS:
            for curvature in self._curvatures:
                curvature.rank = torch.full_like(curvature.rank, curvature.bucket.rank)


def _cost(curvature: Curvature, found: Coordinates, rank: Tensor) -> Tensor:
    """Predicted rise of the loss if the coordinates beyond ``rank`` are dropped: ``[S]``."""
    position = torch.arange(curvature.bucket.rank, device=rank.device)
    gone = (position >= rank[:, None]) & (position < curvature.rank[:, None])
    return curvature.factors.price * (found.energy * gone).sum(-1).float()
