"""Names of modules, as they are whatever wraps the model."""

from __future__ import annotations

import re

# The prefix of DataParallel and DDP, and the one of torch.compile before each module that it was called on.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")


def plain_name(name: str) -> str:
    """A module's name without the parts that DataParallel, DDP and ``torch.compile`` put into it."""
    return _WRAPPERS.sub("", f"{name}.").removesuffix(".")
