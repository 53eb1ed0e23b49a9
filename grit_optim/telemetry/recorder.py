"""Write records from snapshots, each once its copies have arrived, so that no step waits for the device."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from grit_optim.messages import warn
from grit_optim.options.checks import flag, whole
from grit_optim.sinks import Record, Sink
from grit_optim.telemetry.snapshot import Snapshot

MOST_PENDING = 4
"""Snapshots kept while their copies travel. With one more, the oldest is waited for."""


@dataclass(frozen=True)
class Contents:
    """What a record holds beside each site's scalars.

    Attributes:
        log_fisher_spectrum: whether it holds the leading eigenvalues of both factors.
        log_top_eigs: how many of them.
        log_eig_heatmaps: whether it holds the eigenvectors of both factors.
        log_eig_heatmaps_modules: for how many of the first sites.
    """

    log_fisher_spectrum: bool = False
    log_top_eigs: int = 8
    log_eig_heatmaps: bool = False
    log_eig_heatmaps_modules: int = 6

    def __post_init__(self) -> None:
        for name in ("log_fisher_spectrum", "log_eig_heatmaps"):
            flag(name, getattr(self, name))
        for name in ("log_top_eigs", "log_eig_heatmaps_modules"):
            whole(1)(name, getattr(self, name))

    def columns(self, snapshot: Snapshot) -> dict[str, list[Any]]:
        """The snapshot's columns, with the eigenvalues and eigenvectors that were asked for."""
        return snapshot.columns(
            self.log_top_eigs if self.log_fisher_spectrum else 0,
            self.log_eig_heatmaps_modules if self.log_eig_heatmaps else 0,
        )


class Recorder:
    """Feeds one sink.

    Args:
        sink: takes the records.
        every: steps between two records. The first step has one too.
        contents: what a record holds.
    """

    def __init__(self, sink: Sink, every: int, contents: Contents) -> None:
        self.sink: Sink | None = sink
        self.every = every
        self.contents = contents
        self.last_step: int | None = None
        self._pending: deque[tuple[Record, Snapshot]] = deque()

    def due(self, step: int) -> bool:
        """Whether the step, counted from 1, is to be recorded."""
        return self.sink is not None and (step == 1 or step % self.every == 0)

    def submit(self, record: Record, snapshot: Snapshot) -> None:
        """Take a step's record, to be written when its snapshot has arrived."""
        self.last_step = record["step"]
        self._pending.append((record, snapshot))
        self.drain(wait=False)

    def drain(self, wait: bool) -> None:
        """Write the records whose snapshots have arrived, in order; all records if ``wait``."""
        while self._pending:
            record, snapshot = self._pending[0]
            if not (wait or snapshot.arrived() or len(self._pending) > MOST_PENDING):
                return
            self._pending.popleft()
            self.write({**record, **snapshot.scalars(), "sites": self.contents.columns(snapshot)})

    def write(self, record: Record) -> None:
        """Hand a record to the sink. Gives up a sink that fails, with a warning; training goes on."""
        if self.sink is None:
            return
        try:
            self.sink(record)
        except Exception as error:
            sink, self.sink = self.sink, None
            self._pending.clear()
            with suppress(Exception):  # what it has to say then is the failure of before
                _close(sink)
            warn(
                f"{type(sink).__name__} failed on the {record['kind']!r} record of step {record['step']} "
                f"and is given no more: {type(error).__name__}: {error}. Training goes on; mend the sink and "
                "call log_to() again"
            )

    def close(self, end: Record) -> None:
        """Write what is pending and the record ``end``, and close the sink; a warning if that fails."""
        try:
            self.drain(wait=True)
            self.write(end)
        finally:
            sink, self.sink = self.sink, None
            try:
                _close(sink)
            except Exception as error:
                warn(
                    f"{type(sink).__name__} could not be closed: {type(error).__name__}: {error}. What it "
                    "was given last may be missing there"
                )


def _close(sink: Sink | None) -> None:
    """Close a sink that can be closed."""
    close = getattr(sink, "close", None)
    if close is not None:
        close()
