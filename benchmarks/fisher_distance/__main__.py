"""`python -m benchmarks.fisher_distance`, which is `python -m benchmarks fisher-distance`."""

from __future__ import annotations

import sys

from ..core.command import call, parser_of
from .study import DISTANCE

if __name__ == "__main__":
    sys.exit(call(parser_of(DISTANCE, "python -m benchmarks.fisher_distance")))
