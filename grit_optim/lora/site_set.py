"""The sites that an optimizer works on, followed while the model changes.

A pair may be unfrozen, replaced, deleted or moved to another device in the course of training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.lora.buckets import Bucket, build_buckets, check_distinct, check_real
from grit_optim.lora.by_modality import ModalityOf, with_modality
from grit_optim.lora.discovery import find_sites, frozen_pairs, no_sites_message, pairs_elsewhere
from grit_optim.lora.site import Site
from grit_optim.messages import listed, warn
from grit_optim.processes import shards


class SiteSet:
    """The sites that an optimizer works on, in a model that may change.

    Args:
        base: the optimizer that holds the sites' parameters.
        model: where LoRA pairs are looked for. None in a copy of the optimizer, which keeps its sites but not
            the model.
        given: sites from the user, for hand-written LoRA; None: look for PEFT's in ``model``.
        tapped_only: whether pairs that no tap sees are left to the base.
        moves: whether the pairs change coordinates in training. Those that cannot are left to the base.
        modality_of: what says a pair's modality before the model's structure does.

    Attributes:
        all: the sites worked on, in the model's order.
        given: whether the user gave the sites, so that none are looked for.
        model: the model. It is kept alive: the caller may have made an ``nn.ModuleList`` for this alone.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | None,
        given: Sequence[Site] | None = None,
        tapped_only: bool = False,
        moves: bool = False,
        modality_of: ModalityOf | None = None,
    ) -> None:
        self.all: list[Site] = []
        self.given, self._given = given is not None, given
        self._base = base
        self._tapped_only, self._moves, self._modality_of = tapped_only, moves, modality_of
        self.model = model
        self._seen: dict[int, Tensor] = {}  # the base's parameters at the latest find()
        self._frozen: list[tuple[Tensor, Tensor]] = []  # A and B that the base holds but that are not trained
        self._untapped: dict[str, str] = {}  # name to reason
        self._elsewhere: set[int] = set()  # what may be pairs of another model, and has been named
        self._weights: list[tuple[Tensor, Tensor, object]] = []  # A, B and A's device when they were taken

    def first(self, model: nn.Module) -> list[Site]:
        """The model's pairs that are trained now; those that are trained later are tapped then.

        Or the pairs that the user gave.

        Raises:
            TypeError: what was given is no sequence of sites.
            NotImplementedError: FSDP1 or ZeRO has flattened them.
            ValueError: the base holds no pair of the model, trained now or not.
        """
        if problem := shards.flattened(model, self._parameters()):
            raise NotImplementedError(problem)
        if self._given is not None:
            return with_modality(given_sites(self._given), model, self._modality_of)
        sites, untapped = self._find(model)
        if not sites and not frozen_pairs(model, self._parameters()):
            raise ValueError(no_sites_message(model, untapped, self._base.param_groups))
        return self.find(model)

    def find(self, model: nn.Module) -> list[Site]:
        """The sites worked on now, and those of the model's other pairs that are trained.

        Warns of trained adapters that cannot be tapped, and of pairs of another model in the base, once each.
        Notes which pairs are frozen, for :meth:`grown`.
        """
        parameters = self._parameters()
        found, untapped = self._find(model)
        self._seen = {id(p): p for p in parameters}
        known = self.present()
        tapped = {id(site.a) for site in known}
        self._frozen = [(a, b) for a, b in frozen_pairs(model, parameters) if id(a) not in tapped]
        self._warn_of_untapped(untapped)
        self._warn_of_elsewhere(model)
        names = {site.name for site in known}
        return [*known, *(site for site in found if site.name not in names)]

    def _find(self, model: nn.Module, frozen_too: bool = False) -> tuple[list[Site], dict[str, str]]:
        """The model's trained pairs, and those that are left to the base, name to reason."""
        found, left = find_sites(model, self._parameters(), frozen_too)
        for site in found:
            if site.untapped and (self._tapped_only or (self._moves and site.fixed)):
                left[site.name] = site.untapped
        return with_modality(
            [site for site in found if site.name not in left], model, self._modality_of
        ), left

    def _warn_of_untapped(self, untapped: Mapping[str, str]) -> None:
        news = {name: reason for name, reason in untapped.items() if self._untapped.get(name) != reason}
        self._untapped.update(news)
        if news:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in news.items())
            warn(
                f"GRIT leaves {len(news)} adapter(s) to the base optimizer alone: {reasons}. They are "
                "trained without curvature. Leave their layers out of the LoraConfig if that is not wanted"
            )

    def _warn_of_elsewhere(self, model: nn.Module) -> None:
        found = pairs_elsewhere(model, self._base.param_groups)
        news = [name for i, name in found.items() if i not in self._elsewhere]
        self._elsewhere |= found.keys()
        if news:
            warn(
                f"the base optimizer holds {len(news)} parameter(s) that look like A and B of LoRA pairs and "
                f"are none of {type(model).__name__}'s: {listed(news)}. They are trained without curvature. "
                "Where they are another model's, pass both, as in GritOptimizer(base, "
                "torch.nn.ModuleList([one, other]))"
            )

    def with_trained(self) -> list[Site] | None:
        """The sites worked on, and those that have become trained since; None if sites are not looked for."""
        return self.find(self.model) if self.model is not None and not self.given else None

    def grown(self) -> bool:
        """Whether pairs may be trained now that were not at the latest :meth:`find`.

        A pair that was frozen is not, or the base holds a parameter that it did not hold.
        """
        if self.model is None or self.given:
            return False
        unfrozen = any(a.requires_grad and b.requires_grad for a, b in self._frozen)
        return unfrozen or any(id(p) not in self._seen for p in self._parameters())

    def held(self) -> set[str]:
        """Names of the sites whose matrices the base holds now. A parameter may leave its groups."""
        ids = {id(p) for p in self._parameters()}
        return {site.name for site in self.present() if id(site.a) in ids and id(site.b) in ids}

    def with_named(self, names: Collection[str]) -> list[Site] | None:
        """The sites worked on, and others among ``names``, of which a checkpoint has state, frozen or not.

        Without those that are gone. None where nothing is to change, as where sites are not looked for.
        """
        present = self.present()
        missing = set(names) - {site.name for site in present}
        if self.model is None or self.given or not missing:
            return None if len(present) == len(self.all) else present
        found, _ = self._find(self.model, frozen_too=True)
        return [*present, *(site for site in found if site.name in missing)]

    def all_trainable(self) -> list[Site]:
        """The sites worked on, and the pairs that the base holds although they are frozen now."""
        present = self.present()
        if self.model is None or self.given:
            return present
        names = {site.name for site in present}
        return [*present, *(s for s in self._find(self.model, frozen_too=True)[0] if s.name not in names)]

    def take(self, sites: list[Site]) -> list[Bucket]:
        """Work on ``sites`` from now on.

        Returns:
            The sites, stacked by rank and device.

        Raises:
            TypeError: a matrix is complex.
            ValueError: two sites share a name or a matrix, or the base does not hold a matrix of a new one.
            NotImplementedError: a matrix is partitioned over processes.
        """
        check_distinct(sites)
        check_real(sites)
        check_whole({site.name: site.a for site in sites})
        ids, known = {id(p) for p in self._parameters()}, {id(site) for site in self.all}
        new = [site for site in sites if id(site) not in known]
        strangers = [site.name for site in new if not {id(site.a), id(site.b)} <= ids]
        if strangers:
            raise ValueError(
                f"site(s) {listed(strangers)} have weights that the base optimizer does not hold. Build the "
                "base optimizer on the model's trainable parameters"
            )
        buckets = build_buckets(sites)
        self.all = sites
        self._weights = [(site.a, site.b, site.a.device) for site in sites]
        return buckets

    def present(self) -> list[Site]:
        """The sites whose weights are still trained: neither deleted since, nor replaced but in the base too.

        Accelerate puts FSDP2's parameters in the places of those of before, in the base's groups as well. Of
        a deleted adapter nothing else may be asked: its modules are gone.
        """
        taken = list(zip(self.all, self._weights, strict=True))
        there = [site.holds(a, b) for site, (a, b, _) in taken]
        if all(there):
            return list(self.all)
        ids = {id(p) for p in self._parameters()}
        return [
            site
            for (site, _), same in zip(taken, there, strict=True)
            if same or (not site.deleted and shards.is_shared(site.a) and {id(site.a), id(site.b)} <= ids)
        ]

    def remaining(self) -> list[Site] | None:
        """The sites that are still in the model; None if none was replaced, deleted or moved.

        PEFT's ``update_layer`` replaces weights, ``delete_adapter`` deletes them, ``Module.to`` may move
        them. Warns of weights that were replaced or deleted.

        Raises:
            NotImplementedError: a matrix has been partitioned over processes.
        """
        if self.all and self.model is not None and (p := shards.flattened(self.model, self._parameters())):
            raise NotImplementedError(p)
        present = self.present()
        taken = {id(site): weights for site, weights in zip(self.all, self._weights, strict=True)}
        moved = any(a.device != device for a, _, device in self._weights)
        swapped = any(not site.holds(*taken[id(site)][:2]) for site in present)
        if any(a.dim() < 2 for a, _, _ in self._weights):
            check_whole({site.name: site.a for site in present})
        if len(present) == len(self.all) and not moved and not swapped:
            return None
        there = {id(site) for site in present}
        replaced = [site.name for site in self.all if id(site) not in there]
        if replaced:
            warn(
                f"the weights of {len(replaced)} LoRA site(s) ({listed(replaced)}) were replaced or deleted "
                "after the optimizer was built. The base optimizer does not hold the new ones, so they are "
                "not trained. Build a new optimizer after changing adapters"
            )
        return present

    def weight_versions(self) -> list[int]:
        """How often each A has been changed in place, by torch's count.

        Counts that have changed between two steps show that somebody has loaded weights.
        """
        return [a._version for a, _, _ in self._weights]

    def matrices(self) -> list[Tensor]:
        """A and B of all sites, as they were taken."""
        return [matrix for a, b, _ in self._weights for matrix in (a, b)]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._base.param_groups for p in group["params"]]


def check_model(model: object) -> nn.Module:
    """The model.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the second argument must be the model (an nn.Module), got {type(model).__name__}")
    return model


def given_sites(sites: object) -> list[Site]:
    """The sites that a user hands over.

    Raises:
        TypeError: it is no sequence of sites.
    """
    found: list[Any] = list(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else [sites]
    for place, site in enumerate(found):
        if not isinstance(site, Site):
            raise TypeError(
                f"sites must be a list of grit_optim.Site, got {type(site).__name__} at place {place}. Make "
                "one with Site.from_modules(name, a, b, scaling), or Site.from_parameters"
            )
    return found


def check_whole(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are partitioned over processes.

    Args:
        parameters: site name to A.

    Raises:
        NotImplementedError: the parameter's shards cannot be brought together (tensor parallelism, offload),
            or it is no matrix (FSDP1, ZeRO-3).
    """
    for name, parameter in parameters.items():
        if problem := shards.problem(parameter):
            raise NotImplementedError(f"the weight of site {name!r} {problem}")
        if parameter.dim() < 2:
            raise NotImplementedError(
                f"the weight of site {name!r} is a flat vector of {parameter.numel()} entries: FSDP1 or "
                f"ZeRO-3 has partitioned it over processes, where no matrix is left. {shards.TURN_ON_FSDP2}"
            )
