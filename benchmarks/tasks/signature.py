"""The task "signature": write a function's `def` line from the first paragraph of its docstring.

Signatures are written without annotations and default values: sources annotate unevenly, and a default is
rarely said in the first paragraph. Train and held-out functions come from different packages, none of them in
the base model's pretraining.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..base_model.corpus import SourceFile
from ..base_model.load import ANSWER, EOS
from .embedded import (
    HELDOUT_SIZE,
    Groups,
    Recipe,
    Row,
    Sample,
    apart,
    choose,
    encode,
    sources,
    without_repeats,
)
from .functions import Definition, definitions, parse, usable

if TYPE_CHECKING:
    from .words import Words

TRAIN_PACKAGES = (
    "sympy", "matplotlib", "networkx", "numpy", "fontTools", "huggingface_hub", "mpmath", "pygments",
    "psutil", "click",
)  # fmt: skip
HELDOUT_PACKAGES = ("jinja2", "fsspec", "pyparsing", "packaging", "rich")
TRAIN_SIZE = 10_000  # at most
MAX_ANSWER = 32  # tokens, <eos> included
MIN_WORDS = 4  # of a docstring's first paragraph: fewer say too little
_NEAR_WORDS = (
    4  # the same signature with the same first words is a copy, even if the text goes on differently
)


def signature(node: Definition) -> str:
    """`def name(arguments):` without annotations and defaults."""
    arguments = node.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    bare = ast.arguments(
        posonlyargs=arguments.posonlyargs,
        args=arguments.args,
        vararg=arguments.vararg,
        kwonlyargs=arguments.kwonlyargs,
        kw_defaults=[None] * len(arguments.kwonlyargs),
        kwarg=arguments.kwarg,
        defaults=[],
    )
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {node.name}({ast.unparse(bare)}):"


def _first_paragraph(node: Definition) -> str:
    """The docstring's first paragraph on one line; empty where there is none."""
    paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    return " ".join(paragraphs[0].split())


def samples(file: SourceFile) -> Iterator[Sample]:
    """Functions of one file that have a docstring and a name that may be asked for."""
    tree = parse(file.text)
    for qualified, node in definitions(tree) if tree else ():
        text = _first_paragraph(node)
        if usable(node.name) and len(text.split()) >= MIN_WORDS:
            line = signature(node)
            prompt, answer = f"{text}\n{ANSWER}", f"{line}{EOS}"
            yield Sample(file.package, f"{file.path}:{qualified}", line, near_key(text), prompt, answer)


def near_key(text: str) -> str:
    """What near-copies of a docstring share: its first words without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower())[:_NEAR_WORDS])


def _rows(split: str, packages: tuple[str, ...], tokenizer: Words) -> Groups:
    groups = {package: [made for file in sources(package) for made in samples(file)] for package in packages}
    encoded = {
        name: encode(split, made, tokenizer, MAX_ANSWER, shorten=True) for name, made in groups.items()
    }
    return without_repeats(encoded)


def build(tokenizer: Words) -> list[Row]:
    """Both splits from the installed sources; takes about half a minute."""
    heldout = _rows("heldout", HELDOUT_PACKAGES, tokenizer)
    train = apart(_rows("train", TRAIN_PACKAGES, tokenizer), heldout, lambda row: (row.label, row.body))
    train = apart(train, heldout, lambda row: tuple(row.prompt))
    return choose(train, TRAIN_SIZE) + choose(heldout, HELDOUT_SIZE)


RECIPE = Recipe(
    "signature",
    (*TRAIN_PACKAGES, *HELDOUT_PACKAGES),
    build,
    "2d96141916310641ae8d4b64295b80572045396b3268f916740f6eb1db44c4b1",
)
