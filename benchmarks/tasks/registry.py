"""The embedded tasks by name, and how a task is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.files import BenchmarkError
from . import embedded, external, naming, packages, prose, signature
from .embedded import Recipe
from .external import DataOptions
from .task import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TASKS: dict[str, Recipe] = {one.RECIPE.name: one.RECIPE for one in (naming, packages, prose, signature)}


def check_task(name: str) -> str:
    """The name itself, or an error that lists the known ones."""
    if name not in TASKS:
        raise BenchmarkError(f"unknown task {name!r}; known: {', '.join(sorted(TASKS))}")
    return name


def load_task(name: str, tokenizer: Tokenizer, data: DataOptions | None = None) -> Task:
    """The embedded task of that name, or public data where `data` says from where."""
    if data is None:
        return embedded.load(TASKS[check_task(name)], tokenizer)
    return external.load(name, tokenizer, data)
