"""A page of held-out pictures with right and wrong answers, from a run's result."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base_model.icons import PIXELS, WHITE
from ..base_model.load import load_tokenizer
from ..core.files import BenchmarkError
from ..core.plots import save
from ..core.results import read_results
from ..tasks.answers import shared_words
from ..tasks.registry import TASKS, load_task
from ..tasks.task import PictureExample
from .summary import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, ROWS = 8, 3  # of each kind
_NEAR = 0.6  # word F1 from which an answer stands with the right ones
_RIGHT, _SHARED, _WRONG = "#009E73", "#0072B2", "#D55E00"
_LETTERS = 15  # in a line


class Answer(NamedTuple):
    """A held-out picture with what the model said."""

    example: PictureExample
    said: str

    @property
    def is_right(self) -> bool:
        """Whether the model said the whole name."""
        return self.said == self.example.text

    @property
    def f1(self) -> float:
        """F1 of the words of name and answer."""
        return shared_words(self.example.text, self.said)


def best_run(folder: Path, optimizer: str | None = None) -> Result:
    """The folder's run with the lowest loss of those on a task with pictures."""
    found = [
        result
        for result in read_results(folder)
        if result.get("answers") and optimizer in (None, result["config"]["optimizer"])
    ]
    if not found:
        tasks = ", ".join(name for name, recipe in TASKS.items() if recipe.has_pictures)
        who = f" by {optimizer}" if optimizer else ""
        raise BenchmarkError(
            f"{folder} holds no finished run{who} on a task with pictures ({tasks}); run one first: "
            f"python -m benchmarks run --task icons --optimizers grit --lrs 5e-3 --out {folder}"
        )
    return min(found, key=lambda result: result["final_loss"])


def answers(result: Result) -> list[Answer]:
    """The run's answers beside the pictures of this machine, which must be those of the run."""
    task = load_task(result["config"]["task"], load_tokenizer())
    if task.fingerprint != result["task_fingerprint"]:
        raise BenchmarkError(
            f"the run's pictures were other ones (fingerprint {result['task_fingerprint'][:12]}, here "
            f"{task.fingerprint[:12]}): install the versions that pyproject.toml pins"
        )
    examples = [example for example in task.heldout if isinstance(example, PictureExample)]
    return [Answer(*pair) for pair in zip(examples, result["answers"], strict=True)]


def _show(axis: Axes, answer: Answer) -> None:
    rows = [answer.example.picture[start : start + PIXELS] for start in range(0, PIXELS**2, PIXELS)]
    axis.imshow([list(row) for row in rows], cmap="gray", vmin=0, vmax=WHITE, interpolation="nearest")
    colour = _RIGHT if answer.is_right else _SHARED if answer.f1 else _WRONG
    axis.set_title(textwrap.fill(answer.example.text, _LETTERS), fontsize=7, pad=3)
    said = textwrap.fill(answer.said or "nothing", _LETTERS)
    axis.set_xlabel(said, fontsize=7, color=colour, labelpad=2)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color(colour)


def draw_answers(found: Sequence[Answer], path: Path) -> Path:
    """Write a page: the first answers with most words right, and the first others, in the order of the task.

    The name stands above a picture, the answer below it: green where it is right as a whole, blue where some
    words are, orange where none is.
    """
    from matplotlib.figure import Figure

    room = COLUMNS * ROWS
    near = [answer for answer in found if answer.f1 >= _NEAR][:room]
    far = [answer for answer in found if answer.f1 < _NEAR][:room]
    lines = [-(-len(some) // COLUMNS) for some in (near, far)]
    figure = Figure(figsize=(1.25 * COLUMNS, 1.75 * sum(lines)), dpi=110, layout="constrained")
    axes = list(figure.subplots(sum(lines), COLUMNS, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for start, some in ((0, near), (lines[0] * COLUMNS, far)):
        for axis, answer in zip(axes[start:], some, strict=False):
            axis.axis("on")
            _show(axis, answer)
    return save(figure, path)


def page(folder: Path, path: Path, optimizer: str | None = None) -> str:
    """Draw the page of a folder's best run; returns a line that says whose answers they are."""
    result = best_run(folder, optimizer)
    found = answers(result)
    draw_answers(found, path)
    config, right = result["config"], sum(answer.is_right for answer in found)
    return (
        f"{config['optimizer']} at learning rate {config['lr']:g}, seed {config['seed']}: {right} of "
        f"{len(found)} names right, word F1 {result['word_f1']:.3f}; written: {path}"
    )
