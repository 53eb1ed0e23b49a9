"""The settings of an optimizer, and the type of the functions that make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

REFERENCE = "adamw"  # what every other optimizer is compared with


@dataclass(frozen=True)
class Settings:
    """What every optimizer's factory is given.

    Attributes:
        options: keywords for the optimizer's own constructor.
        base: the optimizer that GRIT wraps.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    base: str = "adamw"

    def adam(self) -> dict[str, Any]:
        """Rate, betas and weight decay under the names that Adam and most others give them."""
        return {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}


Factory = Callable[[torch.nn.Module, Settings], torch.optim.Optimizer]


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that ask for a gradient, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
