"""Training and held-out examples of a fine-tuning run, in the model's own tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..core.files import BenchmarkError, sha256
from ..tasks.external import DATA, Text, fingerprint, in_words, read_splits, split_off, without_prompts_of
from ..tasks.task import Example, Task
from ..tasks.words import ModelTokenizer
from . import pictures
from .config import FinetuneConfig
from .rows import HubData, Turn, read, table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # OWNER/NAME, perhaps with one of its configurations
_FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt")  # such a name is of a file that is not there
_CHUNK = 512  # texts tokenized at a time
_SELECTION_SEED = (
    0  # which examples are drawn depends on the data alone, so that runs of all seeds share them
)


@dataclass(frozen=True)
class Origin:
    """Where data come from: a name (the hub's copy, or a folder of local ones), or rows that the user gives.

    Attributes:
        name: of known data, or what the run calls them.
        own: a file of the user, or an id on the hub; None for known data.
        folder: of local copies of known data.
        heldout: a file of held-out rows beside `own`.
    """

    name: str
    own: Path | HubData | None = None
    folder: Path | None = None
    heldout: Path | None = None

    @property
    def hub(self) -> str | None:
        """The hub's id of the data, whichever copy is read; None for a file."""
        if isinstance(self.own, HubData):
            return self.own.repository
        return None if self.own else DATA[self.name].hub

    @property
    def argument(self) -> str:
        """The value of `--dataset` without paths of this machine."""
        if self.own:
            return self.own.name if isinstance(self.own, Path) else str(self.own)
        return f"{self.name}=FOLDER" if self.folder else self.name


@dataclass(frozen=True)
class Heldout:
    """By what held-out answers are judged beside their loss.

    Attributes:
        answers: the right answers as text, in the order of the task's held-out examples.
        labels: token ids of every answer there is, the end token included; empty where answers are free.
        is_number: whether an answer ends in a number after "####".
    """

    answers: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...] = ()
    is_number: bool = False


@dataclass(frozen=True)
class FinetuneData:
    """Training and held-out examples, and what the held-out ones are judged by."""

    task: Task
    heldout: Heldout


def parse_origin(dataset: str, heldout: Path | None) -> Origin:
    """The origin that `--dataset` and `--eval-data` name.

    Raises:
        BenchmarkError: Neither known data, nor a file that exists, nor of the form of a hub id.
    """
    name, separator, folder = dataset.partition("=")
    if name in DATA and not (separator and not folder):
        if heldout:
            raise BenchmarkError(
                f"--eval-data is for data of your own choice; {name} has a held-out part of its own"
            )
        if folder and not Path(folder).is_dir():
            raise BenchmarkError(f"--dataset {dataset}: no such folder: {folder}")
        return Origin(name, folder=Path(folder) if folder else None)
    if heldout and not heldout.is_file():
        raise BenchmarkError(f"--eval-data {heldout}: no such file; give a jsonl or parquet file")
    if Path(dataset).is_file():
        return Origin(Path(dataset).stem, Path(dataset), heldout=heldout)
    if _HUB_ID.fullmatch(dataset) and Path(dataset).suffix not in _FILES:
        repository, _, config = dataset.partition(":")
        return Origin(repository.partition("/")[2], HubData(repository, config or None), heldout=heldout)
    raise BenchmarkError(
        f"{dataset} is neither known data ({', '.join(DATA)}) nor a file; give one of these names, "
        "NAME=FOLDER with NAME_train.jsonl and NAME_test.jsonl, a jsonl or parquet file, or the hub's "
        "OWNER/NAME"
    )


def _splits(
    origin: Origin, tokenizer: PreTrainedTokenizerBase, processor: Any
) -> tuple[list[Text], list[Text]]:
    if origin.own is None:
        return read_splits(origin.name, origin.folder, "--dataset")

    def texts(source: Path | HubData) -> list[Text]:
        """The texts of the source's rows, with pictures where it has some."""
        rows, folder = table(source), source.parent if isinstance(source, Path) else None
        if pictures.has_pictures(rows):
            return [*pictures.read(rows, folder, processor)]
        return read(rows, tokenizer)

    train = texts(origin.own)
    return (train, texts(origin.heldout)) if origin.heldout else split_off(train)


class Encoder:
    """Turns texts into examples with the model's tokenizer.

    A prompt begins as the tokenizer begins texts, and an answer ends with the end token. Text from a chat
    template is not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, processor: Any = None) -> None:
        self.words, self._processor = ModelTokenizer(tokenizer), processor

    def __call__(self, texts: Sequence[Text]) -> list[Example]:
        """One example per text; the first token of a text without any prompt is given, not asked for."""
        made, words = list[Example](), self.words
        for text, asked, said in zip(
            texts, words.ids([t.prompt for t in texts]), words.ids([t.answer for t in texts]), strict=True
        ):
            if isinstance(text, pictures.PictureTurn):
                made.append(pictures.encoded(text, said, self._processor))
                continue
            raw = isinstance(text, Turn)
            prompt, answer = (*(() if raw else words.begin), *asked), (*said, *(() if raw else (words.end,)))
            if not prompt:
                prompt, answer = answer[:1], answer[1:]
            made.append(Example(tuple(prompt), tuple(answer)))
        return made

    def label(self, text: str) -> tuple[int, ...]:
        """The ids of an answer, the end token included."""
        return self([Text("x", text)])[0].answer


def _chosen(
    texts: Sequence[Text], encoder: Encoder, most: int | None, max_length: int, name: str
) -> tuple[list[Example], list[Text], list[str]]:
    """Examples that fit, their texts, and what was left out in words; `most` draws so many at random."""
    order: Iterable[Text] = (
        texts if most is None else random.Random(_SELECTION_SEED).sample(texts, len(texts))
    )
    answered = [text for text in order if text.answer.strip()]
    examples, kept, seen, long = list[Example](), list[Text](), 0, 0
    with tqdm(total=len(answered), desc=f"tokenizing {name}", unit="row", leave=False) as bar:
        while seen < len(answered) and (most is None or len(examples) < most):
            chunk = answered[seen : seen + (_CHUNK if most is None else min(_CHUNK, most - len(examples)))]
            for text, example in zip(chunk, encoder(chunk), strict=True):
                if len(example) > max_length:
                    long += 1
                else:
                    examples.append(example)
                    kept.append(text)
            seen += len(chunk)
            bar.update(len(chunk))
    counts = {
        f"of more than {max_length} tokens": long,
        "without an answer": len(texts) - len(answered),
        "not drawn": len(answered) - seen,
    }
    return examples, kept, [f"{count:,} {what}" for what, count in counts.items() if count]


def load(
    origin: Origin, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, processor: Any = None
) -> FinetuneData:
    """Load the data of an origin; the task's note says what was left out.

    Args:
        origin: where the data are.
        tokenizer: the model's.
        config: of the run.
        processor: of a model that reads pictures; else None.

    Raises:
        BenchmarkError: Data that cannot be had or read, or of which nothing fits in `max_length` tokens.
    """
    encoder = Encoder(tokenizer, processor)
    train, test = _splits(origin, tokenizer, processor)
    apart = without_prompts_of(test, train)
    training, _, left = _chosen(apart, encoder, config.train_examples, config.max_length, "training examples")
    heldout, texts, left_of_test = _chosen(
        test, encoder, config.eval_examples, config.max_length, "held-out examples"
    )
    if len(apart) < len(train):
        left.append(f"{len(train) - len(apart):,} that the held-out split asks too")
    both = in_words("training", training, left), in_words("held-out", heldout, left_of_test)
    note = f"{origin.name}: {'; '.join(both)}"
    if not training or not heldout:
        raise BenchmarkError(
            f"{note}: a split is empty; give a larger --max-length, more data, or held-out examples with "
            "--eval-data"
        )
    source = DATA.get(origin.name) if origin.own is None else None
    labels = tuple(encoder.label(text) for text in source.labels) if source else ()
    judged = Heldout(tuple(text.answer for text in texts), labels, bool(source and origin.name == "gsm8k"))
    found = fingerprint({"train": training, "heldout": heldout})
    if seen := [*pictures.digests(training), *pictures.digests(heldout)]:
        found = sha256([found, *seen])
    metric = "accuracy" if labels else "exact match of the final number" if judged.is_number else None
    return FinetuneData(Task(origin.name, tuple(training), tuple(heldout), found, metric, note), judged)
