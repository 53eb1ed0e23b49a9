"""The task "icons": say the name of a picture, which is an icon of the set Phosphor in one of five styles.

The base model has learnt to name Material Design icons. Phosphor draws other lines and gives other names, and
each of its icons is drawn thin, light, regular, bold and filled, which the name says too. Held out are whole
stems (names without words of style): no picture of a held-out name, in whatever style, stands in training,
nor did it in the base model's pretraining, whose split goes by the same hash. What this does not exclude: one
motif under two names, as Material's "magnify" and Phosphor's "magnifying glass".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base_model import vlm
from ..base_model.icons import PACKAGES, PHOSPHOR, WHEEL, icons, render
from ..base_model.load import EOS
from ..core.files import BenchmarkError, sha256
from .embedded import HELDOUT_SIZE, Recipe, Row
from .task import Example, PictureExample
from .words import ModelTokenizer, answer_ids

if TYPE_CHECKING:
    from .words import Words

MAX_ANSWER = 16  # tokens, <eos> included


def _split(held_out: bool) -> str:
    return "heldout" if held_out else "train"


def build(tokenizer: Words) -> list[Row]:
    """Both splits, each in the order of a hash; takes some seconds."""
    if isinstance(tokenizer, ModelTokenizer):
        raise BenchmarkError(
            "task icons is for the embedded model that reads pictures: leave out --base, or take "
            "`python -m benchmarks train`, whose rows may have pictures, for another model"
        )
    some = icons(PHOSPHOR)
    answers = answer_ids(tokenizer, [f" {icon.name}{EOS}" for icon in some])
    rows = [
        Row(
            _split(icon.is_held_out),
            WHEEL,
            icon.name,
            icon.stem,
            hashlib.sha256(picture).hexdigest(),
            list(vlm.PROMPT),
            answer,
        )
        for icon, picture, answer in zip(some, render(PHOSPHOR, some), answers, strict=True)
        if len(answer) <= MAX_ANSWER
    ]
    rows.sort(key=lambda row: sha256([row.origin]))
    heldout = [row for row in rows if row.split == "heldout"][:HELDOUT_SIZE]
    drawn = {row.body for row in heldout}
    return [*(row for row in rows if row.split == "train" and row.body not in drawn), *heldout]


def with_pictures(rows: Sequence[Row]) -> list[Example]:
    """The rows' examples with their pictures, which are rendered again: that is faster than to keep them."""
    known = {icon.name: icon for icon in icons(PHOSPHOR)}
    pictures = render(PHOSPHOR, [known[row.origin] for row in rows])
    return [
        PictureExample(tuple(row.prompt), tuple(row.answer), picture, row.origin)
        for row, picture in zip(rows, pictures, strict=True)
    ]


RECIPE = Recipe(
    "icons",
    PACKAGES,
    build,
    "d9129cd398c12eebf4df9dcde1c8f8d7d9cb8ec18e175a1abaf9b69441f99f57",
    examples=with_pictures,
    has_pictures=True,
)
