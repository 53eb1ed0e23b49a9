"""The methods GRIT is compared with, each through its own package (the extra `peers` installs them)."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.settings import Factory
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

# Where a sweep may start to bracket the best rate, for LoRA of rank 16 on a small Llama with 48 examples a
# step. Only a start: AdamW's and GRIT's are measured, the others follow from the size of the method's step
# against AdamW's.
LR_CENTRES: dict[str, float] = {
    "adamw": 1e-2,
    "grit": 1e-2,
    "loraplus": 2.5e-3,  # A's; times 16 for B, so that the geometric mean is AdamW's
    "lorafa": 2e-2,  # Adam's step, but on B alone
    "riemannian": 1e-2,  # Adam's step
    "lorarite": 5e-3,  # Adam's step in an orthonormal basis, which A and B then magnify
    "soap-rank": 1e-2,  # Adam's step, turned
    "soap-full": 1e-2,
    "shampoo-rank": 4e-3,  # RMSprop's length, without Adam's correction of the first steps
    "shampoo-full": 4e-3,
    "kl-shampoo": 3e-2,  # the seed of its factors holds the first steps back
    "kl-soap": 1e-2,
    "muon": 3e-2,  # 0.2 times the rate in root mean square
    "singd": 1e-3,  # the gradient times up to 1/damping = 1,000
    "adamw8bit": 1e-2,
}
