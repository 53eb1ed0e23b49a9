"""Texts of tasks in the tokens of a base model: the embedded one's, or a model's own, in its chat form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from ..base_model.load import ANSWER, EOS, MAX_POSITIONS
from ..core.files import BenchmarkError
from . import formats

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    Words: TypeAlias = Union[Tokenizer, "ModelTokenizer"]  # noqa: UP007


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], asking: bool, place: str
) -> str:
    """Messages as the tokenizer's chat template writes them; with `asking` up to where an answer begins.

    Raises:
        BenchmarkError: The template refuses them; the error names their `place`.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
    except (
        Exception
    ) as error:  # a template is a program of its author's; jinja has one class per kind of mistake
        raise BenchmarkError(f"{place}: the tokenizer's chat template refuses it: {error}") from error
    return str(text)


class ModelTokenizer:
    """A model's own tokenizer, as tasks use it.

    A chat model is asked in its chat template: the task's text is the user's message, without what stands
    for a template otherwise (Alpaca's sections, the embedded model's <answer>). Another model reads the text
    as it is, begun as its tokenizer begins texts. An answer ends with the tokenizer's end token.

    Attributes:
        begin: ids before a text that no template has written.
        end: the end token's id.
        positions: tokens that the model reads at a time, where it says so.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> None:
        self.tokenizer, self.positions = tokenizer, positions
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise BenchmarkError(
                "the model's tokenizer has no end token (eos_token), so no answer could ever end"
            )
        self.end = end
        self.begin = tuple(token for token in tokenizer("")["input_ids"] if token != end)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The texts' own ids, nothing before or after them."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def frame(self) -> int:
        """Tokens of a prompt that are the template's."""
        return len(self.prompts([""])[0])

    @cached_property
    def closing(self) -> int:
        """Tokens of a prompt that come after the task's text: those in which two prompts end alike."""
        one, other = (prompt[::-1] for prompt in self.prompts([f"a\n{ANSWER}", f"1\n{ANSWER}"]))
        return next(place for place, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """What the model reads before its answers."""
        if not self.is_chat:
            return [[*self.begin, *one] for one in self.ids(texts)]
        said = [formats.as_message(text.removesuffix(f"\n{ANSWER}")) for text in texts]
        asked = [
            render(self.tokenizer, [{"role": "user", "content": one}], True, f"the prompt {one[:60]!r}")
            for one in said
        ]
        return self.ids(asked)

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """The answers' ids, the end token last; a chat's answer stands on a line of its own."""
        plain = [text.removesuffix(EOS) for text in texts]
        return [[*one, self.end] for one in self.ids([t.lstrip() for t in plain] if self.is_chat else plain)]

    def identity(self) -> str:
        """What decides the ids, as text."""
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        ids = backend.to_str() if backend else str(sorted(self.tokenizer.get_vocab().items()))
        return "\n".join((ids, str(self.tokenizer.chat_template), str(self.begin), str(self.end)))


def text_ids(words: Words, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that are neither prompt nor answer."""
    if isinstance(words, ModelTokenizer):
        return words.ids(texts)
    return [encoding.ids for encoding in words.encode_batch(list(texts))]


def prompt_ids(words: Words, texts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts, a chat model's in its template."""
    return words.prompts(texts) if isinstance(words, ModelTokenizer) else text_ids(words, texts)


def answer_ids(words: Words, texts: Sequence[str]) -> list[list[int]]:
    """Ids of answers that end with EOS, which is put as the model's own end token."""
    return words.answers(texts) if isinstance(words, ModelTokenizer) else text_ids(words, texts)


def frame_tokens(words: Words) -> int:
    """Tokens of every prompt that are not the task's own: those of a chat template."""
    return words.frame if isinstance(words, ModelTokenizer) else 0


def closing_tokens(words: Words) -> int:
    """Tokens at the end of every prompt that stand for no text: what comes between a text and its answer."""
    return words.closing if isinstance(words, ModelTokenizer) else 1


def most_tokens(words: Words) -> int | None:
    """Tokens that the model reads at a time, where it says so."""
    return words.positions if isinstance(words, ModelTokenizer) else MAX_POSITIONS


def identity(words: Words) -> str:
    """What decides the ids, as text."""
    return words.identity() if isinstance(words, ModelTokenizer) else words.to_str()
