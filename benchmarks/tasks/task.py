"""A task: its examples, and the order in which a run meets them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..core.files import BenchmarkError, sha256

_SELECTION_SEED = 0
_GROUP = 16  # batches that are sorted by length together: padding falls below a tenth, the order stays random


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its answer; the loss is on the answer alone."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class PictureExample(Example):
    """An example whose prompt holds a picture's tokens.

    `picture` is grey, row by row, one byte a pixel; `text` is the answer as people write it.
    """

    picture: bytes = field(repr=False)
    text: str


@dataclass(frozen=True)
class Task:
    """Training and held-out examples, the sha256 of both, and the name of the share of exactly right answers.

    `metric` is None where that share means nothing (free text); `note` says what was left out of the data.
    """

    name: str
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    fingerprint: str
    metric: str | None = "exact match"
    note: str = ""

    @property
    def has_pictures(self) -> bool:
        """Whether its examples have pictures."""
        return isinstance(next(iter(self.heldout), None), PictureExample)

    def drawn(self, train: int | None, heldout: int | None) -> Task:
        """The task with at most so many examples of each split; None: all of them.

        Which ones are drawn depends on the data alone, so that runs of all seeds share them, and a smaller
        draw is the beginning of a larger one.
        """
        if train is None and heldout is None:
            return self
        splits = [
            self._draw(examples, count) for examples, count in ((self.train, train), (self.heldout, heldout))
        ]
        return replace(
            self,
            train=splits[0],
            heldout=splits[1],
            fingerprint=sha256([self.fingerprint, str(train), str(heldout)]),
            note=f"{self.note or self.name}; drawn: {len(splits[0]):,} and {len(splits[1]):,}",
        )

    @staticmethod
    def _draw(examples: tuple[Example, ...], count: int | None) -> tuple[Example, ...]:
        order = random.Random(_SELECTION_SEED).sample(range(len(examples)), len(examples))
        return examples if count is None else tuple(examples[place] for place in order[:count])

    def batches(self, seed: int, batch_size: int) -> Iterator[list[Example]]:
        """Endless training batches in an order that depends on `seed` and `batch_size` alone.

        Every epoch is a new permutation; batches hold examples of like length, so that little is padding.
        """
        if not 1 <= batch_size <= len(self.train):
            raise BenchmarkError(
                f"batch size {batch_size} is not between 1 and the {len(self.train)} training examples"
            )
        generator = random.Random(seed)
        while True:
            yield from self._epoch(generator, batch_size)

    def _epoch(self, generator: random.Random, size: int) -> Iterator[list[Example]]:
        """One pass over whole batches; what does not fill a batch is left out of this pass."""
        order = generator.sample(range(len(self.train)), len(self.train) // size * size)
        for start in range(0, len(order), size * _GROUP):
            group = sorted(order[start : start + size * _GROUP], key=lambda index: len(self.train[index]))
            batches = [group[place : place + size] for place in range(0, len(group), size)]
            generator.shuffle(batches)
            for batch in batches:
                yield [self.train[index] for index in batch]
