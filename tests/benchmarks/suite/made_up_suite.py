"""A small suite, and the losses of its runs where nothing is trained."""

import math

from benchmarks.suite.contenders import Contender, SuiteSettings
from benchmarks.suite.folder import Suite

ADAMW, SLOW, GRIT = (
    Contender("adamw", "adamw", lr=0.01),
    Contender("adamw-0.6", "adamw", 0.6, lr=0.01),
    Contender("grit", "grit", lr=0.01),
)
SIZES = SuiteSettings(
    steps=100, explore_steps=100, eval_every=50, seeds=(0, 1, 2), extensions=2, longest_budget=1.2
)
SMALL = Suite(SIZES, ("naming",), (ADAMW, SLOW, GRIT))
GAIN = {"adamw": 0.0, "grit": 0.22}


def usual(run):
    """0.01 nats a step, best at rate 0.01; GRIT 22 steps ahead, AdamW with β1 = 0.6 5 steps behind."""
    gain = -0.05 if run.beta1 == 0.6 else GAIN[run.optimizer]
    return 3.0 + abs(math.log2(run.lr / 0.01)) - 0.01 * run.steps + 0.01 * run.seed - gain
