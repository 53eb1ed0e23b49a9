"""Which pairs are worked on: those that the model trains at first, those that it trains later, those that are left."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from grit_optim.lora.buckets import Bucket, build_buckets, check_distinct
from grit_optim.lora.discovery import find_sites, frozen_pairs, no_sites_message
from grit_optim.lora.site import Site
from grit_optim.messages import listed, warn


class Sites:
    """The pairs that an optimizer works on, in a model that may change.

    Args:
        base: the optimizer that holds their parameters.
        model: where they are looked for; None for a copy, which knows its pairs and not the model. A weak
            reference is kept.
        given: the pairs, where they are not to be looked for.

    Attributes:
        all: the pairs, in the model's order.
        given: whether they were handed over.
    """

    def __init__(self, base: Optimizer, model: nn.Module | None, given: Sequence[Site] | None = None) -> None:
        self.all: list[Site] = []
        self.given = given is not None
        self._base = base
        self._model = weakref.ref(model) if model is not None else None
        self._frozen: list[tuple[Tensor, Tensor]] = []  # held by the base, not trained, and so not tapped
        self._weights: list[tuple[Tensor, Tensor, object]] = []

    @property
    def model(self) -> nn.Module | None:
        """The model, if it is known and still there."""
        return self._model() if self._model is not None else None

    def find(self, model: nn.Module) -> list[Site]:
        """The pairs worked on, and the model's other pairs that are trained; those that cannot be tapped are named.

        Raises:
            ValueError: there is no pair.
        """
        parameters = self._parameters()
        found, untapped = find_sites(model, parameters)
        if not (found or self.all):
            raise ValueError(no_sites_message(model, untapped))
        tapped = {id(site.a) for site in self.all}
        self._frozen = [(a, b) for a, b in frozen_pairs(model, parameters) if id(a) not in tapped]
        if untapped:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in untapped.items())
            warn(
                f"GRIT leaves {len(untapped)} adapter(s) to the base optimizer alone, since they cannot be "
                f"tapped: {reasons}"
            )
        names = {site.name for site in self.all}
        return [*self.all, *(site for site in found if site.name not in names)]

    def with_trained(self) -> list[Site] | None:
        """The pairs worked on and those that the base holds and that are trained now; None if they are not looked for."""
        model = self.model
        return self.find(model) if model is not None and not self.given else None

    def unfrozen(self) -> bool:
        """Whether a pair that was frozen when pairs were looked for is trained now."""
        return any(a.requires_grad and b.requires_grad for a, b in self._frozen)

    def with_named(self, names: Collection[str]) -> list[Site] | None:
        """The pairs worked on and frozen ones of these names, which a checkpoint has state of; None if there are none."""
        model, missing = self.model, set(names) - {site.name for site in self.all}
        if model is None or not self._frozen or not missing:
            return None
        found, _ = find_sites(model, self._parameters(), frozen_too=True)
        return [*self.all, *(site for site in found if site.name in missing)]

    def take(self, sites: list[Site]) -> list[Bucket]:
        """Work on these pairs from now on.

        Returns:
            The pairs, stacked by rank and device.

        Raises:
            ValueError: two pairs share a name or a matrix, or the base does not hold one.
            NotImplementedError: a matrix is partitioned over processes.
        """
        group_of = {id(p): i for i, group in enumerate(self._base.param_groups) for p in group["params"]}
        check_distinct(sites)
        check_whole({site.name: site.a for site in sites})
        strangers = [site.name for site in sites if id(site.a) not in group_of or id(site.b) not in group_of]
        if strangers:
            raise ValueError(
                f"site(s) {listed(strangers)} have weights that the base optimizer does not hold; build it "
                "on the model's trainable parameters"
            )
        buckets = build_buckets(sites, group_of)
        self.all = sites
        self._weights = [(site.a, site.b, site.a.device) for site in sites]
        return buckets

    def left(self) -> list[Site] | None:
        """The pairs that are still there, if any was replaced (PEFT's ``update_layer``), deleted or moved; else None."""
        same = [site.holds(a, b) for site, (a, b, _) in zip(self.all, self._weights, strict=True)]
        moved = any(a.device != device for a, _, device in self._weights)
        if any(a.dim() < 2 for a, _, _ in self._weights):
            check_whole({site.name: site.a for site in self.all})
        if all(same) and not moved:
            return None
        replaced = [site.name for site, is_same in zip(self.all, same, strict=True) if not is_same]
        if replaced:
            warn(
                f"the weights of {len(replaced)} LoRA site(s) ({listed(replaced)}) were replaced or deleted "
                "after the optimizer was built, and the base optimizer does not hold the new ones, so they "
                "are not trained; build a new optimizer after changing adapters"
            )
        return [site for site, is_same in zip(self.all, same, strict=True) if is_same]

    def weight_versions(self) -> list[int]:
        """How often each A was changed in place: who remembers them knows whether somebody has loaded weights since."""
        return [a._version for a, _, _ in self._weights]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._base.param_groups for p in group["params"]]


def check_whole(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are partitioned over processes.

    Raises:
        NotImplementedError: a parameter is a DTensor (FSDP2, tensor parallelism) or no matrix (FSDP1,
            ZeRO-3).
    """
    for name, parameter in parameters.items():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise NotImplementedError(
                f"site {name!r} holds a DTensor (FSDP2 or tensor parallelism): its rows lie on several "
                "processes, and GritOptimizer needs whole matrices; use DDP, or a single process"
            )
        if parameter.dim() < 2:
            raise NotImplementedError(
                f"the weight of site {name!r} is a flat vector of {parameter.numel()} entries: FSDP1 or "
                "ZeRO-3 has partitioned it over processes, and GritOptimizer needs whole matrices; use DDP, "
                "or a single process"
            )
