"""Rows of a user's own file, or of data on the hub, as prompts and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import BenchmarkError
from ..tasks import formats
from ..tasks.external import Text, from_hub, read_jsonl
from ..tasks.words import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEEDED = "it must be a jsonl file, one JSON object per line"
Rows = dict[str, formats.Row]  # by the place that an error names: `file:line`, or the hub's id and the row


@dataclass(frozen=True)
class HubData:
    """Data on the hub, of whose split `train` all rows are read; `config` is one of several that it holds."""

    repository: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}:{self.config}" if self.config else self.repository


@dataclass(frozen=True)
class Turn(Text):
    """A prompt and an answer that a chat template has written: special tokens are part of the text.

    All turns that open alike stay on one side of a split: a later one's prompt holds the answers before it.
    """

    opening: str = ""

    @property
    def key(self) -> str:
        """The conversation up to its first answer."""
        return self.opening


def _prompt_completion(row: formats.Row) -> Text:
    """The row's prompt and completion, unchanged."""
    return Text(row["prompt"], row["completion"])


def _instruction(row: formats.Row) -> Text:
    """Alpaca's prompt; `input` may be missing."""
    return Text(*formats.alpaca({"input": "", **row}))


def _text(row: formats.Row) -> Text:
    """The row's text as an answer without prompt: all of it is trained on."""
    return Text("", row["text"])


FORMS: dict[tuple[str, ...], Callable[[formats.Row], Text]] = {
    ("prompt", "completion"): _prompt_completion,
    ("instruction", "output"): _instruction,
    ("text",): _text,
}
MESSAGES = "messages"


def read(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The prompts and answers of rows; a conversation gives one for each of the assistant's messages.

    All rows have the form of the first: `prompt` and `completion`; `instruction`, `output` and perhaps
    `input`; `messages` with `role` and `content`; or `text`.

    Raises:
        BenchmarkError: A row lacks a field, or a field holds something else than text; names the row.
    """
    first = next(iter(rows))
    if MESSAGES in rows[first]:
        return [turn for place, row in rows.items() for turn in _turns(row, place, tokenizer)]
    form = form_of(rows[first], first)
    return [checked(row, place, form) for place, row in rows.items()]


def table(source: Path | HubData) -> Rows:
    """The rows of a file, or of data on the hub, by their places.

    Raises:
        BenchmarkError: The source cannot be read, or has no rows.
    """
    if isinstance(source, HubData):
        rows, needed = _hub(source), "give data with rows in their split train"
    else:
        rows = _parquet(source) if source.suffix == ".parquet" else read_jsonl(source, _NEEDED)
        needed = _NEEDED
    if not rows:
        raise BenchmarkError(f"{source} has no rows; {needed}")
    return rows


def _hub(source: HubData) -> Rows:
    """The rows of the split `train`; columns of images are bytes and a name, as in the hub's parquet files.

    Pictures are not decoded here: thousands of them in memory as pixels would be many times their bytes.
    """
    instead = "download its parquet files, and give one of them"
    found = from_hub(source.repository, source.config, "train", instead)
    return _numbered(found.with_format("arrow")[:].to_pylist(), f"{source}, row ")


def _parquet(path: Path) -> Rows:
    """The rows of a parquet file, as the hub keeps its data; columns of images are bytes and a name.

    Raises:
        BenchmarkError: pyarrow is missing, or the file is none.
    """
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise BenchmarkError("parquet files need pyarrow: pip install -e '.[data]'") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ArrowInvalid) as error:
        raise BenchmarkError(f"cannot read {path} ({error}); {_NEEDED}, or a parquet file") from error
    return _numbered(rows, f"{path}:")


def _numbered(rows: Iterable[formats.Row], before: str) -> Rows:
    """The rows of a table by `before` and their numbers, without the columns that they leave empty."""
    return {
        f"{before}{number}": {name: value for name, value in row.items() if value is not None}
        for number, row in enumerate(rows, 1)
    }


def form_of(row: formats.Row, place: str) -> tuple[str, ...]:
    """The fields of the first form of which the row has at least one field."""
    for fields in FORMS:
        if any(field in row for field in fields):
            return fields
    known = "; ".join(" and ".join(fields) for fields in ((MESSAGES,), *FORMS))
    raise BenchmarkError(f"{place} has the fields {', '.join(row) or 'none'}; a row needs one of: {known}")


def checked(row: formats.Row, place: str, fields: tuple[str, ...]) -> Text:
    """The row as prompt and answer, by the fields of its form."""
    missing = [field for field in fields if field not in row]
    if missing:
        raise BenchmarkError(
            f"{place} lacks {', '.join(missing)}; every row of this file needs: {', '.join(fields)}"
        )
    wrong = [field for field in (*fields, "input") if field in row and not isinstance(row[field], str)]
    if wrong:
        raise BenchmarkError(f"{place}: {wrong[0]} is {type(row[wrong[0]]).__name__}, not text")
    return FORMS[fields](row)


def messages_of(row: formats.Row, place: str) -> list[dict[str, Any]]:
    """The row's messages, each with a role and a content."""
    messages = row.get(MESSAGES)
    if not isinstance(messages, list) or not messages:
        raise BenchmarkError(f"{place} lacks {MESSAGES}, a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        lacking = [
            key for key in ("role", "content") if not isinstance(message, dict) or not message.get(key)
        ]
        if lacking:
            raise BenchmarkError(f"{place}: message {number} lacks {', '.join(lacking)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise BenchmarkError(f"{place} has no message of the role assistant, so there is nothing to train on")
    return messages


def _turns(row: formats.Row, place: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Turn]:
    """A prompt and answer for each message of the assistant; the prompt holds all messages before it."""
    if not tokenizer.chat_template:
        raise BenchmarkError(
            f"{place} has {MESSAGES}, but the model's tokenizer has no chat template; use a chat model, or "
            "rows with prompt and completion"
        )
    opening = ""
    for prompt, answer in answered(messages_of(row, place), place, tokenizer):
        opening = opening or prompt
        yield Turn(prompt, answer, opening)


def answered(
    messages: list[dict[str, Any]], place: str, template: PreTrainedTokenizerBase | Any
) -> Iterator[tuple[str, str]]:
    """All that comes before each message of the assistant, and that message, by a chat template."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(template, messages[:number], True, place)
        whole = render(template, messages[: number + 1], False, place)
        if not whole.startswith(prompt):
            raise BenchmarkError(
                f"{place}: the chat template writes the conversation before message {number + 1} otherwise "
                "once that is answered, so the answer cannot be told from the prompt; give rows with prompt "
                "and completion"
            )
        yield prompt, whole[len(prompt) :]
