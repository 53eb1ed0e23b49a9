"""Which PeftModels hold the pairs that an optimizer works on. A module may hold several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from grit_optim.lora.discovery import layers_of_pairs, no_peft_model_message, peft_models_in
from grit_optim.lora.site import Site
from grit_optim.messages import listed


class Home(NamedTuple):
    """A ``PeftModel`` and the sites in it.

    Attributes:
        name: of the PeftModel in the model; ``""`` where there is no other.
        peft_model: the PeftModel.
        sites: those in it, in the model's order.
    """

    name: str
    peft_model: Any
    sites: list[Site]

    def adapters(self) -> list[str]:
        """The names of the adapters that the sites belong to."""
        return sorted({site.adapter for site in self.sites})

    def layer_names(self) -> dict[int, str]:
        """``id(site.a_modules)`` to the layer's name in the base model, for all layers of the PeftModel."""
        return {key: name for key, (name, _) in layers_of_pairs(self.peft_model.get_base_model()).items()}


def homes(model: nn.Module, sites: Sequence[Site]) -> list[Home]:
    """The PeftModels that hold sites, in the model's order. Hand-written LoRA among the sites is left out.

    So are pairs that cannot lose directions. PEFT saves them whole.

    Raises:
        ValueError: a site is in a PEFT layer, but in no PeftModel of ``model``.
    """
    models = peft_models_in(model)
    found = []
    wanted = {id(site): site for site in sites if site.in_peft and not site.fixed}
    for name, peft_model in models.items():
        layers = layers_of_pairs(peft_model)
        inside = [site for site in wanted.values() if id(site.a_modules) in layers]
        wanted = {key: site for key, site in wanted.items() if id(site.a_modules) not in layers}
        if inside:
            found.append(Home(name if len(models) > 1 else "", peft_model, inside))
    if wanted and not models:
        raise ValueError(no_peft_model_message(model))
    if wanted:
        names = listed([site.name for site in wanted.values()])
        raise ValueError(
            f"{len(wanted)} site(s) ({names}) lie in none of the {len(models)} PeftModel(s) that "
            f"{type(model).__name__} holds, so their adapter has no configuration to go with. Pass a model= "
            "that holds all of them, or make the layers' own model one with peft.get_peft_model"
        )
    return found
