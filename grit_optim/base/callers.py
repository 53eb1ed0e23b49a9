"""Who asks: ``torch.distributed.checkpoint`` keeps what is a parameter's, and drops the rest."""

from __future__ import annotations

import sys

_PACKAGE = "torch.distributed.checkpoint"


def asked_by_name() -> bool:
    """Whether that package is among the callers. It hands no argument over that would say so."""
    frame = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_PACKAGE):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def names_of_state_asked() -> bool:
    """Whether it asks the caller what the state of each parameter is made of, to read a flat checkpoint."""
    frame = sys._getframe(2)
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(_PACKAGE) and frame.f_code.co_name == "_unflatten_optim_state_dict"
