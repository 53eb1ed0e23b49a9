"""The embedded tasks by name, and how a task is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..base_model import load as base_model
from ..base_model.source import EMBEDDED, Source, load_tokenizer, positions
from ..core.files import BenchmarkError
from . import embedded, external, icons, naming, packages, prose, signature
from .embedded import Recipe
from .external import DataOptions
from .task import Task
from .words import ModelTokenizer

if TYPE_CHECKING:
    from .words import Words

TASKS: dict[str, Recipe] = {
    one.RECIPE.name: one.RECIPE for one in (naming, packages, prose, signature, icons)
}
# Those of the embedded model that reads text alone, on which the published suites ran.
TEXT_TASKS = tuple(name for name, recipe in TASKS.items() if not recipe.has_pictures)


def check_task(name: str) -> str:
    """The name itself, or an error that lists the known ones."""
    if name not in TASKS:
        raise BenchmarkError(f"unknown task {name!r}; known: {', '.join(sorted(TASKS))}")
    return name


def check_text_task(name: str, command: str) -> str:
    """The name itself, or an error: a task with pictures needs another model than this command adapts."""
    if TASKS[check_task(name)].has_pictures:
        raise BenchmarkError(
            f"task {name} has pictures, and `{command}` adapts a model that reads text alone; take one of "
            f"{', '.join(TEXT_TASKS)}"
        )
    return name


@dataclass(frozen=True)
class Given:
    """What a run is given beside its configuration; a result holds names and fingerprints instead.

    Attributes:
        source: the base model.
        data: where public data come from; None: an embedded task.
        train_examples: draw so many; None: all. `eval_examples` the same of the held-out ones.
    """

    source: Source = field(default_factory=lambda: Source(EMBEDDED, flag="--base"))
    data: DataOptions | None = None
    train_examples: int | None = None
    eval_examples: int | None = None

    def words(self) -> Words:
        """The base model's tokenizer."""
        if self.source.is_embedded:
            return base_model.load_tokenizer()
        return ModelTokenizer(load_tokenizer(self.source), positions(self.source))

    def task(self, name: str) -> Task:
        """The task of that name in the base model's tokens, so many of its examples."""
        return load_task(name, self.words(), self.data).drawn(self.train_examples, self.eval_examples)


PLAIN = Given()


def load_task(name: str, tokenizer: Words, data: DataOptions | None = None) -> Task:
    """The embedded task of that name, or public data where `data` says from where."""
    if data is None:
        return embedded.load(TASKS[check_task(name)], tokenizer)
    return external.load(name, tokenizer, data)
