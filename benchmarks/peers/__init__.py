"""The methods GRIT is compared with, each through its own package (the extra `peers` installs them)."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Factory
from . import adapters, preconditioners

_ALL = ("lr", "betas", "weight_decay")


@dataclass(frozen=True)
class Peer:
    """A method: its factory, the distribution that holds its update rule, and the settings that reach it."""

    factory: Factory
    package: str
    uses: tuple[str, ...] = _ALL


PEERS: dict[str, Peer] = {
    "loraplus": Peer(adapters.loraplus, "peft"),
    "lorafa": Peer(adapters.lorafa, "peft"),
    "riemannian": Peer(adapters.riemannian, "peft"),
    "lorarite": Peer(adapters.lorarite, "pytorch_optimizer"),
    "soap-rank": Peer(preconditioners.soap_rank, "pytorch_optimizer"),
    "soap-full": Peer(preconditioners.soap_full, "pytorch_optimizer"),
    "shampoo-rank": Peer(preconditioners.shampoo_rank, "pytorch_optimizer"),
    "shampoo-full": Peer(preconditioners.shampoo_full, "pytorch_optimizer"),
    "kl-shampoo": Peer(preconditioners.heavyball("KLShampoo"), "heavyball"),
    "kl-soap": Peer(preconditioners.heavyball("KLSOAP"), "heavyball"),
    "muon": Peer(preconditioners.muon, "torch", ("lr", "weight_decay")),
    "singd": Peer(preconditioners.singd, "singd", ("lr", "weight_decay")),
    "adamw8bit": Peer(preconditioners.adamw8bit, "bitsandbytes"),
}

# Learning rates from which a sweep may start its search for LoRA at rank 16 on a small Llama.
LR_CENTRES: dict[str, float] = {"adamw": 5e-3}
