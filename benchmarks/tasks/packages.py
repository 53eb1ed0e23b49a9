"""The task "packages": say from which package a few lines of source are.

The lines stand together in the file, none of them imports anything or names one of the packages or its usual
alias. Classes are balanced; held-out snippets come from other files than training snippets.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..base_model.corpus import SourceFile
from ..base_model.load import ANSWER, EOS
from .embedded import (
    HELDOUT_SIZE,
    Groups,
    Recipe,
    Row,
    Sample,
    apart,
    choose,
    encode,
    split_files,
    without_repeats,
)

if TYPE_CHECKING:
    from .words import Words

PACKAGES = (
    "sympy", "mpmath", "matplotlib", "networkx", "numpy", "fontTools", "huggingface_hub", "pygments", "rich",
    "fsspec",
)  # fmt: skip
TRAIN_SIZE = 6_000
MAX_ANSWER = 16  # tokens, <eos> included
LINES, MIN_LINES, MIN_LETTERS = 5, 3, 40
HELDOUT_PERCENT = 15  # of the files
MAX_PER_FILE = 40  # so that no table or catalogue stands for its package
_MIN_LINE = 15  # characters of a line, white space left out, that count when copies are looked for
_NAMES = "|".join((*PACKAGES, "huggingface"))
_REVEALING = re.compile(rf"(?i:{_NAMES})|(?<!\w)(?:np|mpl|plt|nx|hf|mp)(?!\w)|^\s*(?:import|from)\s")


def runs(text: str) -> Iterator[list[str]]:
    """Maximal runs of lines that reveal nothing; blank lines are left out without ending a run."""
    run: list[str] = []
    for line in text.split("\n"):
        if _REVEALING.search(line):
            yield run
            run = []
        elif line.strip():
            run.append(line.rstrip())
    yield run


def snippets(text: str) -> Iterator[str]:
    """Blocks of three to five neighbouring lines, dedented, that do not overlap."""
    for run in runs(text):
        for start in range(0, len(run), LINES):
            block = run[start : start + LINES]
            snippet = textwrap.dedent("\n".join(block))
            if len(block) >= MIN_LINES and sum(map(str.isalpha, snippet)) >= MIN_LETTERS:
                yield snippet


def line_keys(snippet: str) -> list[str]:
    """The snippet's longer lines without white space, by which copies are recognised."""
    lines = ("".join(line.split()) for line in snippet.split("\n"))
    return [line for line in lines if len(line) >= _MIN_LINE]


def _samples(file: SourceFile) -> list[Sample]:
    """At most MAX_PER_FILE snippets of one file."""
    made = [
        Sample(file.package, f"{file.path}:{place}", file.package, "".join(snippet.split()), snippet, "")
        for place, snippet in enumerate(snippets(file.text))
    ]
    return sorted(made, key=lambda sample: sample.rank)[:MAX_PER_FILE]


def _is_copy(sample: Sample, known: set[str]) -> bool:
    """Whether half of the snippet's lines, or more, stand in a held-out snippet."""
    keys = line_keys(sample.prompt)
    return bool(keys) and 2 * sum(key in known for key in keys) >= len(keys)


def split_samples() -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """Training and held-out snippets by package, the copies of held-out ones left out of training."""
    train, heldout = (
        {package: [sample for file in files for sample in _samples(file)] for package, files in split.items()}
        for split in split_files(PACKAGES, HELDOUT_PERCENT)
    )
    known = {key for made in heldout.values() for sample in made for key in line_keys(sample.prompt)}
    clean = {
        package: [sample for sample in made if not _is_copy(sample, known)] for package, made in train.items()
    }
    return clean, heldout


def _rows(split: str, groups: dict[str, list[Sample]], tokenizer: Words) -> Groups:
    encoded = {
        package: encode(split, [_with_answer(sample) for sample in made], tokenizer, MAX_ANSWER)
        for package, made in groups.items()
    }
    return without_repeats(encoded, key=lambda row: row.body)


def _with_answer(sample: Sample) -> Sample:
    return Sample(
        sample.package,
        sample.origin,
        sample.label,
        sample.body,
        f"{sample.prompt}\n{ANSWER}",
        f" {sample.label}{EOS}",
    )


def build(tokenizer: Words) -> list[Row]:
    """Both splits from the installed sources; takes about ten seconds."""
    train, heldout = split_samples()
    kept = _rows("heldout", heldout, tokenizer)
    # Snippets without a long line have no keys, so whole bodies are compared too.
    rows = apart(_rows("train", train, tokenizer), kept)
    return choose(rows, TRAIN_SIZE) + choose(kept, HELDOUT_SIZE)


RECIPE = Recipe(
    "packages",
    PACKAGES,
    build,
    "f10cdb3de882b732237ff672c1f916b8ed961b1de3ca099c8d99ab0ed863ed19",
    metric="accuracy",
)
