"""The task "naming": say a function's name from its source, where the name is blanked.

Train and held-out functions come from different packages, are cut from what is installed (nothing is downloaded) and are
chosen by a hash of package, qualified name and source. Pinned package versions make them the same everywhere.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import environment
from ..base_model import ANSWER, EOS
from ..corpus import package_sources, stdlib_sources
from ..files import REPOSITORY, sha256, write_text
from . import Example, Task
from .functions import Function, functions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1  # raise it with every change of the code that changes the data
TRAIN_PACKAGES = (
    "stdlib", "sympy", "matplotlib", "fontTools", "numpy", "huggingface_hub", "networkx", "pygments", "mpmath", "psutil",
    "click",
)  # fmt: skip
HELDOUT_PACKAGES = ("jinja2", "fsspec", "pyparsing", "packaging", "rich")
TRAIN_SIZE, HELDOUT_SIZE = 10_000, 384
MAX_PROMPT, MAX_ANSWER = 160, 16  # tokens, <answer> and <eos> included

# What the pinned packages give. The training split contains the standard library, so it also needs the Python version.
EXPECTED_PYTHON = "3.11.7"
EXPECTED_FINGERPRINT = "bdad9478694f9613d8bf0258ffc0dcfdf92e9a54903dc20bfc3db6d2029d6584"


@dataclass(frozen=True)
class Row:
    """One example as it stands in the cache; `split` is "train" or "heldout"."""

    split: str
    package: str
    function: str
    name: str
    body: str  # hash of the body
    prompt: list[int]
    answer: list[int]

    def line(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def fair_shares(counts: dict[str, int], total: int) -> dict[str, int]:
    """Shares of `total`, as even as the counts allow: small packages give all, large ones an equal cap."""
    shares: dict[str, int] = {}
    for place, name in enumerate(sorted(counts, key=lambda key: (counts[key], key))):
        shares[name] = min(counts[name], (total - sum(shares.values())) // (len(counts) - place))
    return shares


def _rows(split: str, package: str, tokenizer: Tokenizer) -> list[Row]:
    """All usable examples of one package, in the order of the choice, without repeated (name, body)."""
    files = stdlib_sources() if package == "stdlib" else package_sources(package)
    found = {(f.name, f.body): f for f in sorted(_all(files), key=lambda f: f.rank, reverse=True)}
    chosen = sorted(found.values(), key=lambda f: f.rank)
    prompts = tokenizer.encode_batch([f"{f.blanked}\n{ANSWER}" for f in chosen])
    # The leading space makes the answer the tokens that the model knows from "def name".
    answers = tokenizer.encode_batch([f" {f.name}{EOS}" for f in chosen])
    return [
        Row(split, package, f.qualified_name, f.name, sha256([f.body]), prompt.ids, answer.ids)
        for f, prompt, answer in zip(chosen, prompts, answers, strict=True)
        if len(prompt.ids) <= MAX_PROMPT and len(answer.ids) <= MAX_ANSWER
    ]


def _all(files: Iterable[Any]) -> list[Function]:
    return [function for file in files for function in functions(file)]


def _choose(rows: dict[str, list[Row]], total: int) -> list[Row]:
    """The first rows of every package, a fair share of `total` each."""
    shares = fair_shares({package: len(items) for package, items in rows.items()}, total)
    return [row for package in rows for row in rows[package][: shares[package]]]


def _without_repeats(rows: dict[str, list[Row]], seen: set[tuple[str, str]]) -> dict[str, list[Row]]:
    """Rows whose (name, body) no earlier package has."""
    kept: dict[str, list[Row]] = {}
    for package, items in rows.items():
        kept[package] = [row for row in items if (row.name, row.body) not in seen]
        seen |= {(row.name, row.body) for row in items}
    return kept


def build(tokenizer: Tokenizer) -> list[Row]:
    """Both splits from the installed sources; takes about a minute."""
    heldout = _without_repeats({name: _rows("heldout", name, tokenizer) for name in HELDOUT_PACKAGES}, set())
    bodies = {row.body for items in heldout.values() for row in items}
    train = _without_repeats({name: _rows("train", name, tokenizer) for name in TRAIN_PACKAGES}, set())
    # The training split gives way, so that the held-out one does not depend on it (nor on Python's version).
    train = {name: [row for row in items if row.body not in bodies] for name, items in train.items()}
    return _choose(train, TRAIN_SIZE) + _choose(heldout, HELDOUT_SIZE)


def _fingerprint(lines: Sequence[str]) -> str:
    return sha256(lines)


def _cache_file(tokenizer: Tokenizer) -> Path:
    """The cache's path; its name changes with the format, the versions and the tokenizer."""
    packages = [name for name in (*TRAIN_PACKAGES, *HELDOUT_PACKAGES) if name != "stdlib"]
    found = environment.require_versions(packages)
    key = sha256([str(FORMAT), environment.python_version(), *map(str, sorted(found.items())), tokenizer.to_str()])
    folder = Path(os.environ.get("GRIT_BENCH_CACHE") or REPOSITORY / ".cache" / "benchmarks")
    return folder / f"naming-{key[:16]}.jsonl"


def _read(path: Path) -> list[Row] | None:
    """The cached rows, or None where there are none or the file is not what was written."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(header)["fingerprint"] != _fingerprint(lines):
            return None
        return [Row(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _warn_if_not_pinned() -> None:
    for name in (*TRAIN_PACKAGES, *HELDOUT_PACKAGES):
        found, pinned = environment.installed_version(name), environment.pinned_versions().get(name.lower())
        if name != "stdlib" and found != pinned:
            warnings.warn(
                f"{name} {found} is installed where pyproject.toml pins {pinned}: the naming task's data differ, "
                "so losses are not comparable with those of the pinned versions",
                stacklevel=3,
            )


def rows(tokenizer: Tokenizer) -> list[Row]:
    """Both splits from the cache, which is made first where it is missing or damaged."""
    path = _cache_file(tokenizer)
    _warn_if_not_pinned()
    cached = _read(path)
    if cached is not None:
        return cached
    built = build(tokenizer)
    lines = [row.line() for row in built]
    header = json.dumps({"format": FORMAT, "fingerprint": _fingerprint(lines), "rows": len(lines)})
    write_text(path, "\n".join([header, *lines]) + "\n")
    return built


def load(tokenizer: Tokenizer) -> Task:
    """The task: about 10,000 training functions and 384 held-out ones."""
    found = rows(tokenizer)
    splits = {
        split: tuple(Example(tuple(row.prompt), tuple(row.answer)) for row in found if row.split == split)
        for split in ("train", "heldout")
    }
    return Task("naming", splits["train"], splits["heldout"], _fingerprint([row.line() for row in found]))
