"""The loss and the exact match of a causal language model on answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from .task import Example

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """`tokens` and `labels`, int64 [examples, positions]; a label is the next token, -100 off the answer."""

    tokens: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]

    def to(self, device: str) -> Batch:
        """A copy of the batch on another device."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.lengths)

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
    return Batch(tokens, labels, lengths)


def answer_logits(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [answer tokens, vocabulary] and targets [answer tokens], row by row; no others are computed."""
    base: Any = getattr(model, "get_base_model", lambda: model)()  # a PeftModel wraps it
    hidden = base.get_decoder()(input_ids=batch.tokens, use_cache=False).last_hidden_state
    wanted = batch.labels != IGNORED
    return base.get_output_embeddings()(hidden[wanted]), batch.labels[wanted]


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
def evaluate(model: Model, examples: Sequence[Example], batch_size: int = 96, device: str = "cpu") -> Score:
    """Score held-out examples.

    An answer counts as exact if every one of its tokens, the end token included, is the most likely one given
    the right tokens before it. That is the same as greedy decoding giving the answer: up to its first mistake
    greedy decoding has exactly these tokens before it.
    """
    was_training, losses, right, tokens = model.training, 0.0, 0, 0
    model.eval()
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        logits, targets = answer_logits(model, collate(chunk).to(device))
        losses += float(cross_entropy(logits.double(), targets, reduction="sum"))
        hits = (logits.argmax(-1) == targets).split([len(example.answer) for example in chunk])
        right += sum(bool(hit.all()) for hit in hits)
        tokens += len(targets)
    model.train(was_training)
    return Score(losses / tokens, right / len(ordered))
