"""Which pairs are tapped: those that the model trains at first, and those that it trains later."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.lora.discovery import Site, find_sites, frozen_pairs, no_sites_message
from grit_optim.messages import warn
from grit_optim.stages import StagedOptimizer


class TappingOptimizer(StagedOptimizer):
    """A staged optimizer that finds its sites in a model."""

    _model: weakref.ref[nn.Module] | None
    _given_sites: bool
    _frozen: list[tuple[Tensor, Tensor]]
    """Pairs that the base holds and that are not tapped, since they were not trained when they were looked for."""

    def _watched_model(self) -> nn.Module | None:
        return self._model() if self._model is not None else None

    def _find_sites(self, base: Optimizer, model: nn.Module, known: Sequence[Site] = ()) -> list[Site]:
        """The sites ``known`` and the model's other pairs; those that cannot be tapped are named in one warning."""
        parameters = _parameters(base)
        found, untapped = find_sites(model, parameters)
        if not (found or known):
            raise ValueError(no_sites_message(model, untapped))
        tapped = {id(site.a) for site in known}
        self._frozen = [(a, b) for a, b in frozen_pairs(model, parameters) if id(a) not in tapped]
        if untapped:
            listed = "; ".join(f"{name}: {reason}" for name, reason in untapped.items())
            warn(
                f"GRIT leaves {len(untapped)} adapter(s) to the base optimizer alone, since they cannot be tapped: {listed}",
            )
        names = {site.name for site in known}
        return [*known, *(site for site in found if site.name not in names)]

    def _tap_what_is_trained(self) -> None:
        """Tap the pairs that the base holds and that are trained now, beside those tapped already, which may be frozen."""
        model = self._watched_model()
        if model is not None and not self._given_sites:
            self._take(self._find_sites(self.base, model, self._sites))

    def _tap_unfrozen(self) -> None:
        """The same, where a pair that was frozen is trained now."""
        if any(a.requires_grad and b.requires_grad for a, b in self._frozen):
            self._tap_what_is_trained()

    def _tap_named(self, names: Collection[str]) -> None:
        """Tap frozen pairs of these names too: a checkpoint has their state, from when they were trained."""
        model, missing = self._watched_model(), set(names) - {site.name for site in self._sites}
        if model is not None and self._frozen and missing:
            found, _ = find_sites(model, _parameters(self.base), frozen_too=True)
            self._take([*self._sites, *(site for site in found if site.name in missing)])

    def _take(self, sites: list[Site]) -> None:
        """Tap these sites from now on; what is known of those tapped already is kept."""
        self._remember(sites, self._origin)
        self._attach(sites)


def _parameters(base: Optimizer) -> list[Tensor]:
    return [p for group in base.param_groups for p in group["params"]]
