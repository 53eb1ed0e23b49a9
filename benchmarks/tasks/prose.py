"""The task "prose": language-model adaptation from code to the prose of Python's documentation.

Python's documentation topics (`pydoc_data`, which the base model never saw) are too short for an epoch, so
the training split also has prose paragraphs out of packages' docstrings. Held out are whole topics. Every
paragraph is used once, and none that stands in a held-out topic is in training. The loss is on all tokens of
a window but its first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics as pydoc_topics
from typing import TYPE_CHECKING

from ..base_model.corpus import SourceFile
from ..core.files import sha256
from .embedded import HELDOUT_SIZE, STDLIB, Recipe, Row, choose, sources
from .functions import parse
from .words import text_ids

if TYPE_CHECKING:
    from .words import Words

DOCSTRING_PACKAGES = ("matplotlib", "networkx", "numpy")
TRAIN_SIZE = 4_000  # windows
WINDOW, MIN_WINDOW = 64, 16  # tokens
HELDOUT_CHARACTERS = 60_000  # of unrepeated paragraphs, enough for the held-out windows
MAX_HELDOUT_TOPIC = 15_000  # characters; the few longer topics would each be most of the held-out split
MIN_WORDS, MIN_LETTERS = (
    12,
    0.85,
)  # a docstring's paragraph is prose from so many words and such a share of letters on
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """A text as paragraphs; `runs` are stretches of it with nothing left out in between."""

    package: str
    name: str
    runs: tuple[tuple[str, ...], ...]


def paragraphs(text: str) -> tuple[str, ...]:
    """The parts between blank lines."""
    return tuple(part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip())


def normal(paragraph: str) -> str:
    """The paragraph with single spaces; two paragraphs are equal if this is."""
    return " ".join(paragraph.split())


def topics() -> list[Document]:
    """Python's documentation topics, sorted by name."""
    return [Document(STDLIB, name, (paragraphs(pydoc_topics[name]),)) for name in sorted(pydoc_topics)]


def held_out_topics(found: Iterable[Document]) -> list[Document]:
    """Topics in the order of their names' hashes until they have enough text, without repeated paragraphs."""
    candidates = sorted(
        (topic for topic in found if _size(topic) <= MAX_HELDOUT_TOPIC), key=lambda t: sha256([t.name])
    )
    kept: list[Document] = []
    for topic in unrepeated(candidates, set()):
        if sum(map(_size, kept)) >= HELDOUT_CHARACTERS:
            break
        kept.append(topic)
    return kept


def _size(document: Document) -> int:
    return sum(len(paragraph) for run in document.runs for paragraph in run)


def is_prose(paragraph: str) -> bool:
    """Whether it is running text: enough words, mostly letters, no prompt, directive, list or table."""
    text = normal(paragraph)
    letters = sum(character.isalpha() or character == " " for character in text)
    return (
        text[:1].isalpha()
        and not re.search(r">>>|::|^\s*\.\. |---|===", paragraph, flags=re.MULTILINE)
        and len(text.split()) >= MIN_WORDS
        and letters >= MIN_LETTERS * len(text)
    )


def _docstrings(file: SourceFile) -> Iterator[Document]:
    """The prose of every docstring of one file, neighbouring paragraphs together."""
    for place, node in enumerate(ast.walk(parse(file.text) or ast.Module([], []))):
        text = ast.get_docstring(node) if isinstance(node, _Documented) else None
        if text:
            runs = _runs((part, is_prose(part)) for part in paragraphs(text))
            yield Document(file.package, f"{file.path}:{place}", runs)


def _runs(marked: Iterable[tuple[str, bool]]) -> tuple[tuple[str, ...], ...]:
    """Maximal stretches of the paragraphs that are marked to be kept."""
    runs: list[list[str]] = [[]]
    for paragraph, kept in marked:
        if kept:
            runs[-1].append(paragraph)
        elif runs[-1]:
            runs.append([])
    return tuple(tuple(run) for run in runs if run)


def unrepeated(documents: Iterable[Document], seen: set[str]) -> Iterator[Document]:
    """The documents without paragraphs that were `seen`, in these documents or before; adds to `seen`."""
    for document in documents:
        runs: list[tuple[str, ...]] = []
        for run in document.runs:
            marks = []
            for paragraph in run:
                marks.append((paragraph, normal(paragraph) not in seen))
                seen.add(normal(paragraph))
            runs += _runs(marks)
        yield Document(document.package, document.name, tuple(runs))


def split_documents() -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, which share no paragraph."""
    found = topics()
    heldout = held_out_topics(found)
    names = {topic.name for topic in heldout}
    rest = [topic for topic in found if topic.name not in names]
    rest += [
        made for package in DOCSTRING_PACKAGES for file in sources(package) for made in _docstrings(file)
    ]
    seen = {normal(paragraph) for topic in heldout for run in topic.runs for paragraph in run}
    return list(unrepeated(rest, seen)), heldout


def _windows(split: str, documents: Iterable[Document], tokenizer: Words) -> list[Row]:
    """Windows of at most WINDOW tokens that do not overlap, by package in the order of the choice."""
    texts = [(document, "\n\n".join(run)) for document in documents for run in document.runs]
    rows: list[Row] = []
    for (document, text), ids in zip(texts, text_ids(tokenizer, [text for _, text in texts]), strict=True):
        digest = sha256([text])
        for start in range(0, len(ids), WINDOW):
            first, *rest = ids[start : start + WINDOW]
            if len(rest) >= MIN_WINDOW - 1:
                rows.append(
                    Row(split, document.package, f"{document.name}:{start}", "", digest, [first], rest)
                )
    return sorted(rows, key=lambda row: sha256([row.package, row.origin, row.body]))


def build(tokenizer: Words) -> list[Row]:
    """Both splits; takes about half a minute."""
    train, heldout = (
        _windows(split, documents, tokenizer)
        for split, documents in zip(("train", "heldout"), split_documents(), strict=True)
    )
    own = [row for row in train if row.package == STDLIB]
    more = {package: [row for row in train if row.package == package] for package in DOCSTRING_PACKAGES}
    return own + choose(more, TRAIN_SIZE - len(own)) + heldout[:HELDOUT_SIZE]


RECIPE = Recipe(
    "prose",
    (STDLIB, *DOCSTRING_PACKAGES),
    build,
    "4a6103bb1df1f9cfa34f3d441bfdd173db1304c7f0ef2363a2bb5ce57f5a7041",
    metric=None,
)
