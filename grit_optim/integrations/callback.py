"""Log a GritOptimizer from transformers' Trainer: ``Trainer(..., callbacks=[GritCallback()])``.

Needs transformers. Nothing of GRIT depends on the callback. It starts and ends the logging with the training,
and adds numbers to the Trainer's logs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grit_optim.optimizer import GritOptimizer


class GritCallback(TrainerCallback):
    """Logs the Trainer's GritOptimizer.

    Writes ``grit.jsonl`` into the Trainer's output folder during training, and ``grit_final_ranks.json`` at
    the end, see :meth:`GritOptimizer.final_ranks`. Adds ``grit_engaged_sites``, ``grit_mean_rank``,
    ``grit_mean_cosine`` and ``grit_dropped_folds`` to what the Trainer logs.

    Args:
        sink: a path or sink instead of ``grit.jsonl``.
        **log: further keywords of :meth:`GritOptimizer.log_to`.
    """

    def __init__(self, sink: Any = None, **log: Any) -> None:
        self._sink = sink
        self._log = log
        self._optimizer: GritOptimizer | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Find the optimizer and start logging. Ends the logging of an interrupted run first."""
        if self._optimizer is not None:
            self._optimizer.finish_logging()
        self._optimizer = _unwrapped(optimizer)
        if state.is_world_process_zero:
            self._optimizer.log_to(self._sink or Path(args.output_dir) / "grit.jsonl", **self._log)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add GRIT's numbers to the Trainer's log of a step, which has waited for the device already."""
        if self._optimizer is None or logs is None or "loss" not in logs:
            return
        told = self._optimizer.telemetry(per_site=False)
        ours = {
            "grit_engaged_sites": told["engaged_sites"],
            "grit_mean_rank": sum(told["ranks"].values()) / max(1, len(told["ranks"])),
            "grit_mean_cosine": told["mean_cosine"],
            "grit_dropped_folds": told["dropped_folds"],
        }
        logs.update(ours)
        if state.log_history:
            state.log_history[-1].update(ours)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the logging and write the final ranks."""
        if self._optimizer is None:
            return
        self._optimizer.finish_logging()
        if state.is_world_process_zero:
            self._optimizer.final_ranks(Path(args.output_dir) / "grit_final_ranks.json")
        self._optimizer = None


def _unwrapped(optimizer: Any) -> GritOptimizer:
    """The GritOptimizer inside accelerate's wrappers.

    Raises:
        TypeError: there is none.
    """
    seen = optimizer
    while seen is not None and not isinstance(seen, GritOptimizer):
        seen = getattr(seen, "optimizer", None)
    if seen is None:
        raise TypeError(
            f"GritCallback found a {type(optimizer).__name__} and no GritOptimizer in it; hand the Trainer "
            "one, as in Trainer(..., optimizers=(GritOptimizer(torch.optim.AdamW(parameters, lr), model), "
            "None))"
        )
    return seen
