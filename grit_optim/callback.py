"""A short name for :mod:`grit_optim.integrations.callback`. Needs transformers."""

from grit_optim.integrations.callback import GritCallback

__all__ = ["GritCallback"]
