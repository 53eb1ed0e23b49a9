"""Where records go: a file of JSON lines, TensorBoard, Weights & Biases, or any callable that takes a dict.

A record's ``kind`` is ``"start"`` (options and sites, once per run), ``"step"``, or ``"end"`` (final ranks).
docs/telemetry.md lists what each kind holds.
"""

from grit_optim.sinks.json_lines import JsonLines, Record, Sink
from grit_optim.sinks.tensorboard import TensorBoard
from grit_optim.sinks.wandb import WandB

__all__ = ["JsonLines", "Record", "Sink", "TensorBoard", "WandB"]
