"""The task "naming": say a function's name from its source, where the name is blanked.

Functions are cut from what is installed (nothing is downloaded) and chosen by a hash of package, qualified
name and source. Held-out functions come from other files of the same packages than training functions. Pinned
package versions make them the same everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base_model.corpus import SourceFile
from ..base_model.load import ANSWER, EOS
from .embedded import (
    HELDOUT_SIZE,
    Files,
    Groups,
    Recipe,
    Row,
    Sample,
    apart,
    choose,
    encode,
    split_files,
    without_repeats,
)
from .functions import functions

if TYPE_CHECKING:
    from .words import Words

PACKAGES = (
    "stdlib", "sympy", "matplotlib", "fontTools", "numpy", "huggingface_hub", "networkx", "pygments",
    "mpmath", "psutil",
    "click", "jinja2", "fsspec", "pyparsing", "packaging", "rich",
)  # fmt: skip
TRAIN_SIZE = 10_000  # at most
HELDOUT_PERCENT = 10  # of the files
MAX_ANSWER = 16  # tokens, <eos> included


def _samples(file: SourceFile) -> list[Sample]:
    return [
        # The leading space makes the answer the tokens that the model knows from "def name".
        Sample(file.package, f.qualified_name, f.name, f.body, f"{f.blanked}\n{ANSWER}", f" {f.name}{EOS}")
        for f in functions(file)
    ]


def _rows(split: str, files: Files, tokenizer: Words) -> Groups:
    """All usable examples by package, without repeated (name, body)."""
    groups = {
        package: [sample for file in found for sample in _samples(file)] for package, found in files.items()
    }
    return without_repeats(
        {package: encode(split, made, tokenizer, MAX_ANSWER) for package, made in groups.items()}
    )


def build(tokenizer: Words) -> list[Row]:
    """Both splits from the installed sources; takes about a minute."""
    train, heldout = split_files(PACKAGES, HELDOUT_PERCENT)
    kept = _rows("heldout", heldout, tokenizer)
    return choose(apart(_rows("train", train, tokenizer), kept), TRAIN_SIZE) + choose(kept, HELDOUT_SIZE)


RECIPE = Recipe("naming", PACKAGES, build, "368e9f70a70af6dc682ebfe5fff68ef9011a9bf17283255cb1f133abc9e67fb5")
