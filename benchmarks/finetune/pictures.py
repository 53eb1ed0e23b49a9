"""Rows with pictures, in a vision-language model's own chat form, and batches of them.

A row names its pictures in `image` or `images`: paths beside the file, or what the hub's image columns hold.
They stand before the text of the first message that is not the assistant's, unless the messages say where.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import BenchmarkError
from ..tasks import formats
from ..tasks.task import Example
from .batches import Collator, Inputs
from .rows import MESSAGES, Rows, Turn, answered, checked, form_of, messages_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FIELDS = ("image", "images")


@dataclass(frozen=True)
class Picture:
    """One picture, by its bytes."""

    data: bytes = field(repr=False)

    def open(self) -> Image:
        """The picture in RGB."""
        try:
            from PIL import Image
        except ImportError as error:
            raise BenchmarkError("rows with pictures need Pillow: pip install -e '.[finetune]'") from error
        return Image.open(io.BytesIO(self.data)).convert("RGB")

    @property
    def digest(self) -> str:
        """sha256 of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class PictureTurn(Turn):
    """A prompt with pictures, and an answer."""

    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class PictureExample(Example):
    """An example whose prompt holds pictures' tokens; `text` is the prompt before these were put in."""

    text: str = ""
    pictures: tuple[Picture, ...] = ()


def has_pictures(rows: Rows) -> bool:
    """Whether a row has pictures."""
    return any(map(_has_pictures, rows.values()))


def _has_pictures(row: formats.Row) -> bool:
    return any(name in row for name in FIELDS)


def read(rows: Rows, folder: Path | None, processor: Any) -> list[PictureTurn]:
    """The prompts and answers of rows with pictures; a row may have none.

    Args:
        rows: by their places.
        folder: where pictures that are named by paths lie; None for data on the hub, which hold their own.
        processor: the model's; None for a model of text alone.

    Raises:
        BenchmarkError: There is no processor, a row is malformed, or a picture cannot be read; names the row.
    """
    if processor is None:
        first = next(place for place, row in rows.items() if _has_pictures(row))
        raise BenchmarkError(
            f"{first} holds pictures, and the model reads none; give a vision-language model"
        )
    return [turn for place, row in rows.items() for turn in _turns(row, place, folder, processor)]


def _turns(row: formats.Row, place: str, folder: Path | None, processor: Any) -> Iterator[PictureTurn]:
    pictures = tuple(picture(value, place, folder) for value in _values(row, place))
    messages = _messages(row, place, len(pictures))
    known = "".join(picture.digest for picture in pictures)
    if not getattr(processor, "chat_template", None):
        yield _without_template(row, place, pictures, known, processor)
        return
    opening = ""
    for prompt, answer in answered(messages, place, processor):
        opening = opening or prompt
        yield PictureTurn(prompt, _ended(answer, processor), opening + known, pictures)


def _ended(answer: str, processor: Any) -> str:
    """The answer with the end token, where the template writes none of its own."""
    special, end = processor.tokenizer.all_special_tokens, processor.tokenizer.eos_token
    bare = answer.rstrip()
    return answer if any(bare.endswith(token) for token in special) else f"{bare}{end}"


def _without_template(
    row: formats.Row, place: str, pictures: tuple[Picture, ...], known: str, processor: Any
) -> PictureTurn:
    """A prompt as it is, behind the pictures' marks, for a model that is no chat model."""
    if MESSAGES in row:
        raise BenchmarkError(f"{place} has {MESSAGES}, but the model's processor has no chat template")
    text, mark = checked(row, place, form_of(row, place)), processor.image_token
    marks = "" if text.prompt.count(mark) == len(pictures) else mark * len(pictures)
    answer = f"{text.answer}{processor.tokenizer.eos_token}"
    return PictureTurn(marks + text.prompt, answer, text.prompt + known, pictures)


def _values(row: formats.Row, place: str) -> list[Any]:
    """What the row's field of pictures holds."""
    if all(name in row for name in FIELDS):
        raise BenchmarkError(f"{place} has both image and images; give one of them")
    value = row.get("images", row.get("image"))
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def picture(value: Any, place: str, folder: Path | None) -> Picture:
    """A picture that can be read.

    Raises:
        BenchmarkError: It cannot; names the row.
    """
    name = value if isinstance(value, str) else f"given as {value!r:.40}"
    try:
        if isinstance(value, dict) and value.get("bytes"):  # the hub's image columns, not decoded
            data = value["bytes"]
        elif isinstance(value, dict):  # of data on the hub, in their cache
            data = ((folder or Path()) / value["path"]).read_bytes()
        elif isinstance(value, str):
            if folder is None:
                raise OSError("it is a path, and data on the hub need a column that holds the images")
            data = (folder / value).read_bytes()
        else:
            buffer = io.BytesIO()
            value.save(buffer, "PNG")
            data = buffer.getvalue()
        found = Picture(data)
        found.open()
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise BenchmarkError(
            f"{place}: the image {name} cannot be read ({reason}); give a path beside the file, of a picture "
            "that Pillow opens"
        ) from error
    return found


def _messages(row: formats.Row, place: str, pictures: int) -> list[dict[str, Any]]:
    """The row as messages whose contents are lists, with as many pictures as the row has."""
    if MESSAGES in row:
        said = messages_of(row, place)
    else:
        text = checked(row, place, form_of(row, place))
        said = [{"role": "user", "content": text.prompt}, {"role": "assistant", "content": text.answer}]
    made = [{**message, "content": _parts(message["content"])} for message in said]
    marked = sum(part.get("type") == "image" for message in made for part in message["content"])
    if marked not in (0, pictures):
        raise BenchmarkError(f"{place}: its messages name {marked} images, and the row has {pictures}")
    if not marked:
        asked = next(message for message in made if message["role"] != "assistant")
        asked["content"] = [{"type": "image"}] * pictures + asked["content"]
    return made


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def encoded(text: PictureTurn, answer: Sequence[int], processor: Any) -> PictureExample:
    """The example of a prompt with pictures and of an answer's ids."""
    prompt = _processed(text.prompt, text.pictures, processor)["input_ids"][0].tolist()
    return PictureExample(tuple(prompt), tuple(answer), text.prompt, text.pictures)


def _processed(text: str, pictures: Sequence[Picture], processor: Any) -> dict[str, Tensor]:
    images = [picture.open() for picture in pictures] or None
    return dict(processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))


@dataclass(frozen=True)
class PictureCollator(Collator):
    """As `Collator`, with what the model's processor makes of the pictures."""

    processor: Any = None

    def __call__(self, examples: Sequence[Example]) -> Inputs:
        """The batch. What the processor says of tokens covers the answers too."""
        batch = super().__call__(examples)
        width = batch["input_ids"].shape[1]
        found: dict[str, list[Tensor]] = {}
        for row, example in enumerate(examples):
            if not isinstance(example, PictureExample):
                continue
            made = _processed(example.text, example.pictures, self.processor)
            for name, value in made.items():
                if name in ("input_ids", "attention_mask"):
                    continue
                if value.shape[:2] == (1, len(example.prompt)):
                    known = found.setdefault(name, [value.new_zeros(len(examples), width, *value.shape[2:])])
                    known[0][row, : value.shape[1]] = value[0, :width]
                    if value.dim() > 2:  # which pictures a token may see
                        known[0][row, value.shape[1] :] = value[0, -1]
                else:
                    found.setdefault(name, []).append(value)
        return {**batch, **{name: _together(values) for name, values in found.items()}}


def _together(values: Sequence[Tensor]) -> Tensor:
    """One after another along the first dimension; the others are filled up with zeros."""
    sizes = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    whole = values[0].new_zeros(sum(len(value) for value in values), *sizes)
    start = 0
    for value in values:
        place = (slice(start, start + len(value)), *(slice(size) for size in value.shape[1:]))
        whole[place] = value
        start += len(value)
    return whole


def digests(examples: Sequence[Example]) -> Iterator[str]:
    """What identifies the pictures of the examples."""
    for example in examples:
        yield from (picture.digest for picture in getattr(example, "pictures", ()))
