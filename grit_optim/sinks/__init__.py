"""Where records go: a file of JSON lines, TensorBoard, Weights & Biases. Any callable that takes a dict is a sink too.

A record's ``kind`` is ``"start"`` (options and sites, once per run), ``"step"`` or ``"end"`` (final ranks);
docs/telemetry.md lists what each holds.
"""

from grit_optim.sinks.json_lines import JsonLines, Record, Sink
from grit_optim.sinks.tensorboard import TensorBoard
from grit_optim.sinks.wandb import WandB

__all__ = ["JsonLines", "Record", "Sink", "TensorBoard", "WandB"]
