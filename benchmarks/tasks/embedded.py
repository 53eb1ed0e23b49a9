"""What tasks cut from installed text share: samples, tokens, the choice of samples, the cache, the pins."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..base_model.corpus import SourceFile, is_held_out, package_sources, stdlib_sources
from ..core import environment
from ..core.files import REPOSITORY, sha256, write_text
from .task import Example, Task
from .words import answer_ids, closing_tokens, frame_tokens, identity, prompt_ids

if TYPE_CHECKING:
    from .words import Words

FORMAT = 4  # raise it with every change of the code that changes the data
MAX_LENGTH = 80  # tokens of prompt and answer together, beside a chat template's
HELDOUT_SIZE = (
    768  # at most; on 256 of naming the difference of two optimizers had a standard error of 0.02 nats
)
STDLIB = "stdlib"  # stands among package names for the standard library, whose version is Python's
EXPECTED_PYTHON = "3.11.7"  # with the pinned packages it gives the expected fingerprints


@dataclass(frozen=True)
class Sample:
    """One example as text, with where it comes from."""

    package: str
    origin: str  # the place in the package
    label: str  # what is asked for
    body: str  # what "the same question" compares
    prompt: str
    answer: str

    @cached_property
    def rank(self) -> str:
        """Place in the choice: a hash, so that neither file order nor Python's own hash decides."""
        return sha256([self.package, self.origin, self.label, self.prompt])


@dataclass(frozen=True)
class Row:
    """One example as it stands in the cache; `split` is "train" or "heldout"."""

    split: str
    package: str
    origin: str
    label: str
    body: str  # hash of the sample's body
    prompt: list[int]
    answer: list[int]

    def line(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


Groups = dict[str, list[Row]]  # rows by package, each in the order of the choice


def plain_examples(rows: Sequence[Row]) -> list[Example]:
    """The rows' tokens alone."""
    return [Example(tuple(row.prompt), tuple(row.answer)) for row in rows]


@dataclass(frozen=True)
class Recipe:
    """How a task is cut: the packages, the function, and the fingerprint that the pinned versions give.

    `examples` makes examples of rows; `has_pictures` says whether these need a model that reads pictures.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[Words], list[Row]]
    expected_fingerprint: str
    metric: str | None = "exact match"
    examples: Callable[[Sequence[Row]], list[Example]] = plain_examples
    has_pictures: bool = False


def sources(package: str) -> list[SourceFile]:
    """Sources of an installed package or, under the name "stdlib", of the standard library."""
    return stdlib_sources() if package == STDLIB else package_sources(package)


Files = dict[str, list[SourceFile]]  # by package


def split_files(packages: Iterable[str], heldout_percent: int) -> tuple[Files, Files]:
    """Training and held-out files of packages; which is which a hash of the path decides."""
    train, heldout = Files(), Files()
    for package in packages:
        train[package], heldout[package] = [], []
        for file in sources(package):
            (heldout if is_held_out(file, heldout_percent) else train)[package].append(file)
    return train, heldout


def encode(
    split: str, samples: Iterable[Sample], tokenizer: Words, max_answer: int, shorten: bool = False
) -> list[Row]:
    """Rows in the order of the choice, the first of every (label, body).

    Args:
        split: "train" or "heldout".
        samples: In any order.
        tokenizer: Cuts prompts and answers, each on its own.
        max_answer: Samples with more answer tokens are left out.
        shorten: Whether a prompt that is too long loses tokens before its last one, or its sample is left
            out.
    """
    # The last assignment of a key stays, so the order is reversed: the first in the order of the choice wins.
    unique = {(s.label, s.body): s for s in sorted(samples, key=lambda s: s.rank, reverse=True)}
    chosen = sorted(unique.values(), key=lambda s: s.rank)
    prompts = prompt_ids(tokenizer, [s.prompt for s in chosen])
    answers = answer_ids(tokenizer, [s.answer for s in chosen])
    limit = MAX_LENGTH + frame_tokens(tokenizer)
    if shorten:
        prompts = [_shorten(p, limit - len(a), tokenizer) for p, a in zip(prompts, answers, strict=True)]
    return [
        Row(split, s.package, s.origin, s.label, sha256([s.body]), prompt, answer)
        for s, prompt, answer in zip(chosen, prompts, answers, strict=True)
        if len(answer) <= max_answer and len(prompt) + len(answer) <= limit
    ]


def _shorten(prompt: list[int], room: int, tokenizer: Words) -> list[int]:
    """At most `room` tokens: the first ones, and those at the end that are no text but ask for the answer."""
    asking = closing_tokens(tokenizer)
    return prompt if len(prompt) <= room else [*prompt[: max(room - asking, 0)], *prompt[-asking:]]


def without_repeats(
    rows: Groups, key: Callable[[Row], Hashable] = lambda row: (row.label, row.body)
) -> Groups:
    """Rows whose key no earlier row has."""
    seen, kept = set[Hashable](), Groups()
    for package, items in rows.items():
        kept[package] = []
        for row in items:
            if key(row) not in seen:
                kept[package].append(row)
            seen.add(key(row))
    return kept


def apart(train: Groups, heldout: Groups, key: Callable[[Row], Hashable] = lambda row: row.body) -> Groups:
    """Training rows whose key no held-out row has.

    The training split gives way, so that the held-out one does not depend on it (nor, where only the training
    split has the standard library, on Python's version).
    """
    known = {key(row) for items in heldout.values() for row in items}
    return {package: [row for row in items if key(row) not in known] for package, items in train.items()}


def fair_shares(counts: dict[str, int], total: int) -> dict[str, int]:
    """Shares of `total`, as even as the counts allow: small packages give all, large ones an equal cap."""
    shares: dict[str, int] = {}
    for place, name in enumerate(sorted(counts, key=lambda key: (counts[key], key))):
        shares[name] = min(counts[name], (total - sum(shares.values())) // (len(counts) - place))
    return shares


def choose(rows: Groups, total: int) -> list[Row]:
    """The first rows of every package, a fair share of `total` each."""
    shares = fair_shares({package: len(items) for package, items in rows.items()}, total)
    return [row for package in rows for row in rows[package][: shares[package]]]


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 of all rows, in their order."""
    return sha256(row.line() for row in rows)


def cache_file(recipe: Recipe, tokenizer: Words) -> Path:
    """The cache's path; its name changes with the format, the versions and the tokenizer."""
    found = environment.require_versions([name for name in recipe.packages if name != STDLIB])
    key = sha256(
        [str(FORMAT), environment.python_version(), *map(str, sorted(found.items())), identity(tokenizer)]
    )
    folder = Path(os.environ.get("GRIT_BENCH_CACHE") or REPOSITORY / ".cache" / "benchmarks")
    return folder / f"{recipe.name}-{key[:16]}.jsonl"


def _read(path: Path) -> list[Row] | None:
    """The cached rows, or None where there are none or the file is not what was written."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(header)["fingerprint"] != sha256(lines):
            return None
        return [Row(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def unpinned(recipe: Recipe) -> list[str]:
    """What is installed in another version than the data were fixed with, in words."""
    pins, names = environment.pinned_versions(), [name for name in recipe.packages if name != STDLIB]
    found = [(name, environment.installed_version(name), pins.get(name.lower())) for name in names]
    others = [
        f"{name} {version} is installed where pyproject.toml pins {pin}"
        for name, version, pin in found
        if version != pin
    ]
    if environment.python_version() != EXPECTED_PYTHON:
        others.append(
            f"Python {environment.python_version()} runs where the data were fixed with {EXPECTED_PYTHON}"
        )
    return others


def warn_if_not_pinned(recipe: Recipe) -> None:
    """One warning for each version that is not the pinned one."""
    for other in unpinned(recipe):
        warnings.warn(
            f"{other}: the data of task {recipe.name} may differ, so losses are comparable only with those "
            "of the same fingerprint",
            stacklevel=3,
        )


def load_rows(recipe: Recipe, tokenizer: Words) -> list[Row]:
    """Both splits from the cache, which is made first (up to a minute) where it is missing or damaged."""
    path = cache_file(recipe, tokenizer)
    warn_if_not_pinned(recipe)
    cached = _read(path)
    if cached is not None:
        return cached
    built = recipe.build(tokenizer)
    header = json.dumps({"format": FORMAT, "fingerprint": fingerprint(built), "rows": len(built)})
    write_text(path, "\n".join([header, *(row.line() for row in built)]) + "\n")
    return built


def load(recipe: Recipe, tokenizer: Words) -> Task:
    """The task, its examples in the order of the rows."""
    found = load_rows(recipe, tokenizer)
    train, heldout = (
        tuple(recipe.examples([row for row in found if row.split == split])) for split in ("train", "heldout")
    )
    return Task(recipe.name, train, heldout, fingerprint(found), recipe.metric)
