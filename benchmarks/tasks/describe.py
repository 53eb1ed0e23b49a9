"""Sizes and lengths of tasks, and what the base model knows of them before any training."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from ..base_model.load import load_tokenizer
from ..base_model.vlm import embedded_model
from ..core.results import RunConfig
from .objective import collate, evaluate
from .registry import load_task
from .task import Task

_COLUMNS = (
    "task", "training examples", "held-out examples", "tokens per example", "answer tokens", "padding",
    "base model's held-out loss", "exactly right",
)  # fmt: skip


def padding_share(task: Task, batches: int = 100) -> float:
    """Share of positions that are padding, mean over the first training batches of seed 0."""
    some = itertools.islice(task.batches(0, RunConfig.batch_size), batches)
    return statistics.fmean(collate(batch).padding for batch in some)


def _fields(task: Task) -> tuple[str, ...]:
    score = evaluate(embedded_model(task.has_pictures), task.heldout)
    return (
        task.name,
        f"{len(task.train):,}",
        f"{len(task.heldout):,}",
        f"{statistics.fmean(len(example) for example in task.train):.1f}",
        f"{statistics.fmean(len(example.answer) for example in task.train):.1f}",
        f"{100 * padding_share(task):.1f} %",
        f"{score.loss:.3f}",
        f"{100 * score.exact_match:.1f} % ({task.metric})" if task.metric else "–",
    )


def describe(names: Sequence[str]) -> None:
    """Print a table of the tasks; lengths are means over the training split."""
    from rich.console import Console
    from rich.table import Table

    table, tokenizer = Table(*_COLUMNS), load_tokenizer()
    for name in names:
        table.add_row(*_fields(load_task(name, tokenizer)))
    Console().print(table)
