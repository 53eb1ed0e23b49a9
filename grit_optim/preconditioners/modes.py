"""The modes by name: a new one is entered here, and nowhere else."""

from __future__ import annotations

from grit_optim.options.checks import one_of
from grit_optim.preconditioners.balanced import Balanced
from grit_optim.preconditioners.eigenbasis import Eigenbasis
from grit_optim.preconditioners.inverse import Inverse
from grit_optim.preconditioners.mode import Mode
from grit_optim.preconditioners.none import Identity
from grit_optim.preconditioners.spectral import Spectral
from grit_optim.preconditioners.steer import Steer

MODES: dict[str, type[Mode]] = {
    mode.name: mode for mode in (Spectral, Steer, Eigenbasis, Balanced, Inverse, Identity)
}


def mode_named(name: str) -> type[Mode]:
    """The mode of that name.

    Raises:
        ValueError: there is none.
    """
    one_of(tuple(MODES))("precondition", name)
    return MODES[name]
