"""``from grit_optim.callback import GritCallback``, for transformers' Trainer. Needs transformers."""

from grit_optim.integrations.callback import GritCallback

__all__ = ["GritCallback"]
