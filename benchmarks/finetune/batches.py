"""Examples side by side, and the loss of a model on their answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from ..tasks.objective import IGNORED
from ..tasks.task import Example

if TYPE_CHECKING:
    from torch import Tensor

Inputs = dict[str, "Tensor"]


@dataclass(frozen=True)
class Collator:
    """Puts examples side by side, padded on the right, as keywords of the model's forward.

    With `narrow` the model is asked for logits only at the positions [P] that some row of the batch wants
    (`logits_to_keep`): with a vocabulary of 128,000 the others would be most of the memory. `labels`
    [examples, 1 + P] are the tokens that these positions are to predict, -100 where a row does not want it.
    Their first column is always -100, so that it does not matter whether a trainer counts them shifted or
    not. Without `narrow` P is every position.
    """

    pad: int
    narrow: bool

    def __call__(self, examples: Sequence[Example]) -> Inputs:
        """The batch; an answer's last token is no input, since nothing follows it."""
        longest = max(len(example) for example in examples)
        tokens = torch.full((len(examples), longest), self.pad)
        labels = torch.full_like(tokens, IGNORED)
        mask = torch.zeros_like(tokens)
        for row, example in enumerate(examples):
            start, end = len(example.prompt), len(example)
            tokens[row, :end] = torch.tensor((*example.prompt, *example.answer))
            labels[row, start:end] = tokens[row, start:end]
            mask[row, : end - 1] = 1
        batch = {"input_ids": tokens[:, :-1], "attention_mask": mask[:, :-1]}
        if self.narrow:
            wanted = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
            labels = torch.cat([labels[:, :1], labels[:, 1 + wanted]], dim=1)
            batch["logits_to_keep"] = wanted
        return {**batch, "labels": labels}


def collator(model: Any, pad: int) -> Collator:
    """The collator for a model: narrow where its forward takes `logits_to_keep`."""
    base = getattr(model, "get_base_model", lambda: model)()
    return Collator(pad, "logits_to_keep" in inspect.signature(base.forward).parameters)


def answer_tokens(batches: Sequence[Inputs]) -> Tensor:
    """How many tokens the batches' answers have together, as a float."""
    return torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum() / 1


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in nats, [examples, P], 0 where a row wants nothing.

    Args:
        logits: [examples, P, vocabulary], of any precision.
        labels: [examples, 1 + P], as the collator makes them.
    """
    targets = labels[:, 1:]
    flat = cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)


def token_mean(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A micro-batch's share of the mean loss over all answer tokens of the step; the shares add up to it.

    It is what transformers' Trainer takes as `compute_loss_func`.
    """
    return losses(outputs.logits, labels).sum() / num_items_in_batch
