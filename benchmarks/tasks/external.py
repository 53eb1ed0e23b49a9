"""Tasks on public data: read from a folder of jsonl files, or from the hub's copy through `datasets`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base_model.load import EOS
from ..core.files import BenchmarkError, in_share, sha256
from . import formats
from .task import Example, Task
from .words import answer_ids, most_tokens, prompt_ids

if TYPE_CHECKING:
    from .words import Words

MAX_LENGTH = 256  # tokens of prompt and answer together, unless told otherwise
HELDOUT_PERCENT = 5  # of the prompts, where the data have no split to report on


@dataclass(frozen=True)
class Source:
    """Where data come from and how a row becomes an example.

    `test` is the split that is reported on: the one with public labels; None where there is none, and a share
    of the training split, chosen by a hash of the prompt, is kept apart instead. `labels` are the only
    answers there are.
    """

    hub: str
    config: str | None
    train: str
    test: str | None
    fields: tuple[str, ...]
    texts: Callable[[formats.Row], formats.Texts]
    metric: str | None
    labels: tuple[str, ...] = ()


_ALPACA, _YES_NO = ("instruction", "input", "output"), ("Yes", "No")

DATA = {
    "alpaca": Source("tatsu-lab/alpaca", None, "train", None, _ALPACA, formats.alpaca, None),
    "alpaca-gpt4": Source("vicgalle/alpaca-gpt4", None, "train", None, _ALPACA, formats.alpaca, None),
    "boolq": Source(
        "google/boolq",
        None,
        "train",
        "validation",
        ("question", "answer"),
        formats.boolq,
        "accuracy",
        _YES_NO,
    ),
    "dolly": Source(
        "databricks/databricks-dolly-15k",
        None,
        "train",
        None,
        ("instruction", "context", "response"),
        formats.dolly,
        None,
    ),
    "gsm8k": Source(
        "openai/gsm8k", "main", "train", "test", ("question", "answer"), formats.gsm8k, "exact match"
    ),
    "qnli": Source(
        "nyu-mll/glue",
        "qnli",
        "train",
        "validation",
        ("question", "sentence", "label"),
        formats.qnli,
        "accuracy",
        _YES_NO,
    ),
}


@dataclass(frozen=True)
class DataOptions:
    """What decides external data besides their name. A result holds their fingerprint instead."""

    folder: Path | None = None  # None: the hub's copy
    max_length: int = MAX_LENGTH


@dataclass(frozen=True)
class Text:
    """One row as text."""

    prompt: str
    answer: str

    @property
    def key(self) -> str:
        """Texts with equal keys stand on one side of a split."""
        return self.prompt or self.answer


def check_data(name: str) -> str:
    """The name itself, or an error that lists the known ones."""
    if name not in DATA:
        raise BenchmarkError(f"unknown data {name!r}; known: {', '.join(DATA)}")
    return name


def _parse_line(line: str, where: str) -> formats.Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BenchmarkError(f"{where} is no JSON ({error}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise BenchmarkError(f"{where} is no JSON object; each line must be one")
    return row


def read_jsonl(
    path: Path, needed: str = "the folder must hold NAME_train.jsonl and NAME_test.jsonl"
) -> dict[str, formats.Row]:
    """The rows of a jsonl file by `file:line`; blank lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"cannot read {path} ({error}); {needed}") from error
    places = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    return {place: _parse_line(line, place) for place, line in places.items()}


def from_hub(repository: str, config: str | None, split: str, instead: str) -> Any:
    """One split of data on the hub as a `datasets.Dataset`, downloaded at the first use.

    Args:
        repository: its id, OWNER/NAME.
        config: which of several sets it holds.
        split: the split's name.
        instead: what to do where the hub cannot be reached, for the error.

    Raises:
        BenchmarkError: `datasets` is missing, or the hub does not give the data.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise BenchmarkError(
            f"data {repository!r} from the hub need the package datasets: pip install -e '.[data]'; "
            f"or {instead}"
        ) from error
    try:
        return datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError) as error:
        # OSError: no network, offline mode, missing data; ValueError: another split, one of several configs
        raise BenchmarkError(f"cannot get {repository} from the hub ({error}); {instead}") from error


def _known_from_hub(name: str, split: str, flag: str) -> Iterable[formats.Row]:
    """One split of data known by name; `flag` is the option that named them."""
    source = DATA[name]
    instead = f"name a folder that holds {name}_train.jsonl and {name}_test.jsonl: {flag} {name}=FOLDER"
    found: Iterable[formats.Row] = from_hub(source.hub, source.config, split, instead)
    return found


def _texts(name: str, split: str, rows: Iterable[formats.Row]) -> list[Text]:
    """Prompts and answers; an error names the row that lacks a field or has a label without meaning."""
    source, made = DATA[name], list[Text]()
    for number, row in enumerate(rows, 1):
        missing = [field for field in source.fields if row.get(field) is None]
        if missing:
            raise BenchmarkError(
                f"row {number} of {name}'s {split} split lacks {', '.join(missing)}; "
                f"every row needs: {', '.join(source.fields)}"
            )
        try:
            made.append(Text(*source.texts(row)))
        except (ValueError, AttributeError) as error:  # AttributeError: a number where text belongs
            raise BenchmarkError(f"row {number} of {name}'s {split} split cannot be used: {error}") from error
    if not made:
        raise BenchmarkError(f"{name}'s {split} split has no rows")
    return made


def split_off(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Training and held-out texts: a share of the prompts is held out, with all texts of such a prompt."""
    held_out = [in_share([text.key], HELDOUT_PERCENT) for text in texts]
    sides: tuple[list[Text], list[Text]] = ([], [])
    for text, held in zip(texts, held_out, strict=True):
        sides[held].append(text)
    return sides


def read_splits(name: str, folder: Path | None, flag: str = "--data") -> tuple[list[Text], list[Text]]:
    """Training and held-out texts, from two splits where there are two; errors name the option `flag`."""
    source = DATA[name]
    if folder is None:
        train = _texts(name, "train", _known_from_hub(name, source.train, flag))
        test = _texts(name, "test", _known_from_hub(name, source.test, flag)) if source.test else None
    else:
        train = _texts(name, "train", read_jsonl(folder / f"{name}_train.jsonl").values())
        path = folder / f"{name}_test.jsonl"
        test = _texts(name, "test", read_jsonl(path).values()) if source.test or path.exists() else None
    return split_off(train) if test is None else (train, test)


def without_prompts_of(held: Sequence[Text], train: Sequence[Text]) -> list[Text]:
    """The training texts whose prompts are not held out as well."""
    asked = {text.key for text in held}
    return [text for text in train if text.key not in asked]


def encode(texts: Sequence[Text], tokenizer: Words, max_length: int) -> tuple[list[Example], list[str]]:
    """Examples of at most `max_length` tokens, and in words what was left out."""
    prompts = prompt_ids(tokenizer, [text.prompt for text in texts])
    answers = answer_ids(tokenizer, [text.answer + EOS for text in texts])
    made = [Example(tuple(p), tuple(a)) for p, a in zip(prompts, answers, strict=True)]
    answered = [example for example, text in zip(made, texts, strict=True) if text.answer]
    kept = [example for example in answered if len(example) <= max_length]
    counts = {
        f"of more than {max_length} tokens": len(answered) - len(kept),
        "without an answer": len(made) - len(answered),
    }
    return kept, [f"{count:,} {what}" for what, count in counts.items() if count]


def fingerprint(splits: Mapping[str, Sequence[Example]]) -> str:
    """sha256 of the examples of all splits, in their order."""
    return sha256(
        json.dumps([split, example.prompt, example.answer])
        for split, examples in splits.items()
        for example in examples
    )


def load(name: str, tokenizer: Words, options: DataOptions) -> Task:
    """The task on public data; its note says what was left out.

    Raises:
        BenchmarkError: Data that cannot be had or read, or of which nothing fits in `max_length` tokens.
    """
    most = most_tokens(tokenizer)
    if most and options.max_length > most:
        raise BenchmarkError(f"--max-length {options.max_length}: the base model reads at most {most} tokens")
    train, test = read_splits(check_data(name), options.folder)
    apart = without_prompts_of(test, train)
    training, left_out = encode(apart, tokenizer, options.max_length)
    if len(apart) < len(train):
        left_out.append(f"{len(train) - len(apart):,} that the held-out split asks too")
    heldout, left_out_of_test = encode(test, tokenizer, options.max_length)
    both = in_words("training", training, left_out), in_words("held-out", heldout, left_out_of_test)
    note = f"{name}: {'; '.join(both)}"
    if not training or not heldout:
        raise BenchmarkError(f"{note}: a split is empty; give a larger --max-length, or more data")
    found = fingerprint({"train": training, "heldout": heldout})
    return Task(name, tuple(training), tuple(heldout), found, DATA[name].metric, note)


def in_words(split: str, examples: Sequence[Example], left_out: Sequence[str]) -> str:
    """How many examples a split has, and what was left out."""
    return f"{len(examples):,} {split} examples (left out: {', '.join(left_out) or 'none'})"
