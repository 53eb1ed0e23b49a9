"""Log records as scalars in Weights & Biases."""

from __future__ import annotations

from typing import Any

from grit_optim.sinks.flattening import Flattener
from grit_optim.sinks.json_lines import Record


class WandB:
    """Logs scalars in Weights & Biases. Needs the package ``wandb``.

    Args:
        run: a run, or None for the current one. Without a current one, a run is started with ``settings``.
        per_site: as in :class:`TensorBoard`.
        **settings: for ``wandb.init``, such as ``project="GRIT", mode="offline"``.
    """

    def __init__(self, run: Any = None, per_site: bool = False, **settings: Any) -> None:
        import wandb

        self._own = run is None and wandb.run is None
        self.run = run or wandb.run or wandb.init(**settings)
        self._flatten = Flattener(per_site)

    def __call__(self, record: Record) -> None:
        """Log the record's scalars; the options go to the run's configuration.

        Steps are logged as ``GRIT/step``, since a trainer may count its steps otherwise in the run.
        """
        if record["kind"] == "start":
            self.run.config.update({"grit": record["options"]}, allow_val_change=True)
        elif scalars := self._flatten(record):
            self.run.log({"GRIT/step": record["step"], **scalars})

    def close(self) -> None:
        """End the run, if this sink started it."""
        if self._own:
            self.run.finish()
