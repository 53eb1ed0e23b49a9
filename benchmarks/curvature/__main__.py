"""`python -m benchmarks.curvature`, which is `python -m benchmarks curvature`."""

from __future__ import annotations

import sys

from ..core.command import call, parser_of
from .study import CURVATURE

if __name__ == "__main__":
    sys.exit(call(parser_of(CURVATURE, "python -m benchmarks.curvature")))
