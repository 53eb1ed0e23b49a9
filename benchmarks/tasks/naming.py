"""The task "naming": say a function's name from its source, where the name is blanked.

Train and held-out functions come from different packages, are cut from what is installed (nothing is downloaded) and are
chosen by a hash of package, qualified name and source. Pinned package versions make them the same everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base_model import ANSWER, EOS
from .embedded import HELDOUT_SIZE, Groups, Recipe, Row, Sample, apart, choose, encode, sources, without_repeats
from .functions import functions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAIN_PACKAGES = (
    "stdlib", "sympy", "matplotlib", "fontTools", "numpy", "huggingface_hub", "networkx", "pygments", "mpmath", "psutil",
    "click",
)  # fmt: skip
HELDOUT_PACKAGES = ("jinja2", "fsspec", "pyparsing", "packaging", "rich")
TRAIN_SIZE = 10_000  # at most
MAX_ANSWER = 16  # tokens, <eos> included


def _rows(split: str, packages: tuple[str, ...], tokenizer: Tokenizer) -> Groups:
    """All usable examples by package, without repeated (name, body)."""
    groups = {
        package: [
            # The leading space makes the answer the tokens that the model knows from "def name".
            Sample(package, f.qualified_name, f.name, f.body, f"{f.blanked}\n{ANSWER}", f" {f.name}{EOS}")
            for file in sources(package)
            for f in functions(file)
        ]
        for package in packages
    }
    return without_repeats({package: encode(split, made, tokenizer, MAX_ANSWER) for package, made in groups.items()})


def build(tokenizer: Tokenizer) -> list[Row]:
    """Both splits from the installed sources; takes about a minute."""
    heldout = _rows("heldout", HELDOUT_PACKAGES, tokenizer)
    train = apart(_rows("train", TRAIN_PACKAGES, tokenizer), heldout)
    return choose(train, TRAIN_SIZE) + choose(heldout, HELDOUT_SIZE)


RECIPE = Recipe(
    "naming",
    (*TRAIN_PACKAGES, *HELDOUT_PACKAGES),
    build,
    "2e08cdc91825d53674fb416b42664e5a7f92aecb6b617eb17bd4e8e654b9cdb6",
)
