"""What there is to run on: versions, devices, and the packages that are missing."""

from __future__ import annotations

from typing import Any

import torch

from ..core import environment
from ..peers.registry import PEERS

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "pytest", "rich", "matplotlib", "bitsandbytes",
    "pytorch_optimizer",
    "heavyball", "singd",
)  # fmt: skip
# GRIT and the peers worth the device's time, as far as they are installed; SOAP and Shampoo with both sides
# do not fit.
COMPARED = (
    "grit",
    "riemannian",
    "lorarite",
    "soap-rank",
    "muon",
    "adamw8bit",
    "grit-eigenbasis",
    "grit-paper",
)


def missing() -> list[str]:
    """Packages that some part wants and that are not installed."""
    return [name for name in PACKAGES if environment.installed_version(name) is None]


def optimizers() -> list[str]:
    """The optimizers to compare whose packages are installed."""
    return [
        n for n in COMPARED if n not in PEERS or environment.installed_version(PEERS[n].package) is not None
    ]


def describe() -> dict[str, Any]:
    """Versions, devices, and what is missing."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            **environment.versions(),
            **{name: environment.installed_version(name) for name in PACKAGES},
        },
        "missing": missing(),
        "optimizers": optimizers(),
        "cuda": torch.version.cuda,
        "devices": [
            {"name": d.name, "bytes": d.total_memory, "multiprocessors": d.multi_processor_count}
            for d in devices
        ],
        "hardware": environment.hardware("cuda" if devices else "cpu"),
        "code": environment.commit(),
    }
