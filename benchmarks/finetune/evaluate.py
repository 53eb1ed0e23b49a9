"""Held-out loss, accuracy of labels, and final numbers that the model writes itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm import tqdm

from ..core.results import finite
from ..tasks.task import Example
from .batches import Collator, losses
from .config import FinetuneConfig
from .data import FinetuneData

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_NUMBER = re.compile(r"####\s*\$?\s*(-?\$?[\d,]*\.?\d+)")  # GSM8K marks its final number so


def final_number(text: str) -> Decimal | None:
    """The first number after "####" without thousands' separators and dollar sign; None if there is none."""
    found = _NUMBER.search(text)
    try:
        return Decimal(re.sub(r"[,$]", "", found[1])) if found else None
    except InvalidOperation:
        return None


@dataclass(frozen=True)
class Evaluator:
    """Judges a model on the held-out examples; draws nothing at random and leaves the model as it was."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    data: FinetuneData
    config: FinetuneConfig
    collator: Collator
    limit: int | None = None  # tokens that the model reads at a time

    @torch.no_grad()
    def measure(self, generate: bool) -> dict[str, float | int | None]:
        """`loss` in nats per answer token, `perplexity`, and what else the data are judged by.

        `accuracy`: share of questions whose right label has the highest likelihood of all labels.
        `final_number_exact_match`: share of `generated` questions whose greedily generated answer ends in the
        right number.

        Args:
            generate: also write answers, where they end in numbers; that takes far longer than the rest.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            found = self._loss()
            if self.data.heldout.labels:
                found["accuracy"] = self._accuracy()
            if generate and self.data.heldout.is_number and self.config.generate_examples:
                found |= self._final_numbers()
        finally:
            self.model.train(was_training)
        return found

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        device = self.config.device.partition(":")[0]
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _loss(self) -> dict[str, float | int | None]:
        examples = self.data.task.heldout
        nats = self._nats(examples, "held-out loss").sum()
        mean = float(nats / sum(len(example.answer) for example in examples))
        return {"loss": finite(mean), "perplexity": finite(math.exp(min(mean, 700.0)))}

    def _nats(self, examples: Sequence[Example], name: str) -> Tensor:
        """Negative log-likelihood of each example's answer, float64 [examples], on the CPU."""
        found = torch.zeros(len(examples), dtype=torch.float64)
        for rows in self._by_length([len(example) for example in examples], name):
            batch = {
                k: v.to(self.config.device) for k, v in self.collator([examples[row] for row in rows]).items()
            }
            labels = batch.pop("labels")
            with self.autocast():
                logits = self.model(**batch).logits
            found[rows] = losses(logits, labels).double().sum(-1).cpu()
        return found

    def _by_length(self, lengths: Sequence[int], name: str) -> Iterator[list[int]]:
        """Batches of places with similar lengths, under a progress bar."""
        order, size = sorted(range(len(lengths)), key=lambda place: lengths[place]), self.config.batch_size
        with tqdm(total=len(order), desc=name, unit="example", leave=False) as bar:
            for start in range(0, len(order), size):
                yield order[start : start + size]
                bar.update(len(order[start : start + size]))

    def _accuracy(self) -> float:
        heldout, labels = self.data.task.heldout, self.data.heldout.labels
        asked = [Example(example.prompt, label) for example in heldout for label in labels]
        nats = self._nats(asked, "held-out labels").view(len(heldout), len(labels))
        right = [
            labels[best] == example.answer for best, example in zip(nats.argmin(1), heldout, strict=True)
        ]
        return sum(right) / len(right)

    def _final_numbers(self) -> dict[str, float | int | None]:
        count = min(self.config.generate_examples, len(self.data.task.heldout))
        prompts = [example.prompt for example in self.data.task.heldout[:count]]
        wanted = [final_number(answer) for answer in self.data.heldout.answers[:count]]
        said = [final_number(answer) for answer in self.generate(prompts)]
        right = [one is not None and one == other for one, other in zip(wanted, said, strict=True)]
        return {"final_number_exact_match": sum(right) / count, "generated": count}

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The model's greedy answers, of up to `max_new_tokens` tokens."""
        answers = [""] * len(prompts)
        for rows in self._by_length([len(prompt) for prompt in prompts], "answers"):
            said = self._continue([prompts[row] for row in rows])
            for row, text in zip(
                rows, self.tokenizer.batch_decode(said, skip_special_tokens=True), strict=True
            ):
                answers[row] = text
        return answers

    def _continue(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Tokens after the prompts, which are padded on the left."""
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), self.collator.pad)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        room = self.config.max_new_tokens if self.limit is None else self.limit - longest
        settings = GenerationConfig(
            max_new_tokens=max(1, min(self.config.max_new_tokens, room)),
            do_sample=False,
            use_cache=True,
            pad_token_id=self.collator.pad,
            eos_token_id=self._ends(),
        )
        device = self.config.device
        with self.autocast():
            made = self.model.generate(
                input_ids=tokens.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        return made[:, longest:]

    def _ends(self) -> list[int]:
        """Every token that ends an answer: the tokenizer's, and the model's own, which may be several."""
        own = getattr(self.model.get_base_model().generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        return sorted(end for end in ends if end is not None)
