"""Write records as scalars for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from grit_optim.sinks.flattening import Flattener
from grit_optim.sinks.json_lines import Record


class TensorBoard:
    """Writes scalars for TensorBoard. Needs the package ``tensorboard``.

    Args:
        log_dir: folder of the event files.
        per_site: also write each site's numbers, under ``Fisher/<site>/``; else medians and ranges over sites
            alone.
    """

    def __init__(self, log_dir: str | Path, per_site: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir))
        self._flatten = Flattener(per_site)

    def __call__(self, record: Record) -> None:
        """Add the record's scalars."""
        for name, value in self._flatten(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()
