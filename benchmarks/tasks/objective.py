"""The loss and the exact match of a causal language model on answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from ..base_model.vlm import pixel_values
from .task import Example, PictureExample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel

IGNORED = -100
_LOGITS = 1 << 26  # held at a time in an evaluation: a large vocabulary would fill the memory


@dataclass(frozen=True)
class Batch:
    """`tokens` and `labels`, int64 [examples, positions]; a label is the next token, -100 off the answer.

    `hidden` [examples, positions, width] are what the frozen layers make of the tokens, where they are known;
    `pictures` [examples, 3, height, width] what the tokens of pictures stand for, where there are any.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]
    hidden: torch.Tensor | None = None
    pictures: torch.Tensor | None = None

    def to(self, device: str) -> Batch:
        """A copy of the batch on another device."""
        hidden, pictures = (None if one is None else one.to(device) for one in (self.hidden, self.pictures))
        return Batch(self.tokens.to(device), self.labels.to(device), self.lengths, hidden, pictures)

    @property
    def padding(self) -> float:
        """Share of the positions that are padding."""
        return 1.0 - sum(self.lengths) / self.tokens.numel()


def collate(examples: Sequence[Example], pad: int = 0) -> Batch:
    """Put examples side by side, padded on the right to the longest.

    No attention mask is needed: in a causal model nothing on the right reaches the tokens on its left, and
    the labels on padding are -100. The answer's last token is never an input.
    """
    lengths = tuple(len(example) - 1 for example in examples)
    tokens = torch.full((len(examples), max(lengths)), pad)
    labels = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(examples):
        tokens[row, : lengths[row]] = torch.tensor((*example.prompt, *example.answer[:-1]))
        labels[row, len(example.prompt) - 1 : lengths[row]] = torch.tensor(example.answer)
    return Batch(tokens, labels, lengths, pictures=_pictures(examples))


def _pictures(examples: Sequence[Example]) -> torch.Tensor | None:
    pictures = [example.picture for example in examples if isinstance(example, PictureExample)]
    return pixel_values(pictures) if pictures else None


def _unwrapped(model: Model) -> Any:
    return getattr(model, "get_base_model", lambda: model)()  # a PeftModel wraps it


def answer_states(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [answer tokens, width] and targets [answer tokens], row by row."""
    base = _unwrapped(model)
    reader, given = base.get_decoder(), {"input_ids": batch.tokens}
    if batch.pictures is not None:  # the decoder alone would take the pictures' tokens for text
        reader, given["pixel_values"] = base.base_model, batch.pictures
    elif batch.hidden is not None:  # in the precision of the frozen weights, in which they were computed
        given = {"inputs_embeds": batch.hidden.to(base.get_input_embeddings().weight.dtype)}
    states = reader(**given, use_cache=False).last_hidden_state
    wanted = batch.labels != IGNORED
    return states[wanted], batch.labels[wanted]


def answer_logits(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [answer tokens, vocabulary] and targets [answer tokens], row by row; no others are computed."""
    states, targets = answer_states(model, batch)
    return _unwrapped(model).get_output_embeddings()(states), targets


def answer_loss(model: Model, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the answers' tokens, in nats."""
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits.float(), targets)


@dataclass(frozen=True)
class Score:
    """Loss in nats per answer token, and the share of answers that are right as a whole."""

    loss: float
    exact_match: float


@torch.inference_mode()
def evaluate(
    model: Model,
    examples: Sequence[Example],
    batch_size: int = 96,
    device: str = "cpu",
    collate: Callable[[Sequence[Example]], Batch] = collate,
) -> Score:
    """Score held-out examples, which `collate` puts side by side.

    An answer counts as exact if every one of its tokens, the end token included, is the most likely one given
    the right tokens before it. That is the same as greedy decoding giving the answer: up to its first mistake
    greedy decoding has exactly these tokens before it.
    """
    was_training, losses, right, tokens = model.training, 0.0, 0, 0
    model.eval()
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        states, targets = answer_states(model, collate(chunk).to(device))
        head = _unwrapped(model).get_output_embeddings()
        size, hits = max(1, _LOGITS // head.weight.shape[0]), list[torch.Tensor]()
        for rows, wanted in zip(states.split(size), targets.split(size), strict=True):
            logits = head(rows)
            losses += float(cross_entropy(logits.double(), wanted, reduction="sum"))
            hits.append(logits.argmax(-1) == wanted)
        answers = torch.cat(hits).split([len(example.answer) for example in chunk])
        right += sum(bool(hit.all()) for hit in answers)
        tokens += len(targets)
    model.train(was_training)
    return Score(losses / tokens, right / len(ordered))
