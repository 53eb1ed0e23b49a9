"""Answers that a model writes itself to examples with pictures, and how near they come."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..base_model.load import EOS, PAD, SPECIAL_TOKENS, load_tokenizer
from ..base_model.vlm import pixel_values
from .icons import MAX_ANSWER
from .task import Example, PictureExample

if TYPE_CHECKING:
    from .objective import Model


@torch.inference_mode()
def said(model: Model, examples: Sequence[Example], device: str = "cpu", batch_size: int = 96) -> list[str]:
    """The model's greedy answers to examples with pictures, as text, in the order of the examples."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=MAX_ANSWER,
        do_sample=False,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    whole: Any = model  # torch takes every attribute of a module for a tensor
    was_training, tokenizer, answers = model.training, load_tokenizer(), list[str]()
    model.eval()
    for start in range(0, len(examples), batch_size):
        some = [one for one in examples[start : start + batch_size] if isinstance(one, PictureExample)]
        tokens = torch.tensor([one.prompt for one in some], device=device)  # all prompts have one length
        pictures = pixel_values([one.picture for one in some]).to(device)
        made = whole.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pictures,
            generation_config=settings,
        )
        answers += tokenizer.decode_batch(made[:, tokens.shape[1] :].tolist())
    model.train(was_training)
    return [answer.strip() for answer in answers]


def shared_words(wanted: str, answer: str) -> float:
    """F1 of the words of two names, each counted as often as it stands; in [0, 1]."""
    one, other = Counter(wanted.split()), Counter(answer.split())
    shared = sum((one & other).values())
    return 2 * shared / sum((one + other).values())


def word_f1(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Mean over the examples of the F1 of the words of name and answer."""
    names = [one.text for one in examples if isinstance(one, PictureExample)]
    return statistics.fmean(shared_words(*pair) for pair in zip(names, answers, strict=True))
