"""Functions cut out of source files, with their own names blanked."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from ..base_model.corpus import SourceFile
from ..base_model.load import BLANK

MIN_LINES, MAX_LINES, MIN_NAME = 4, 20, 3
Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function's name and its source with every occurrence of that name replaced by <blank>."""

    package: str
    qualified_name: str
    name: str
    blanked: str
    body: str  # everything below the signature, blanked, without white space: what "the same body" compares


def blank_name(source: str, name: str) -> str:
    """Replace `name` wherever it stands as a whole identifier: in code, strings and comments alike."""
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", BLANK, source)


def _docstring(node: Definition) -> ast.stmt | None:
    first = node.body[0]
    is_text = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    return first if is_text else None


def _stands_alone(statement: ast.stmt, lines: list[str]) -> bool:
    """Whether nothing else shares the statement's first and last line."""
    before = lines[statement.lineno - 1].encode()[: statement.col_offset]
    after = lines[(statement.end_lineno or 0) - 1].encode()[statement.end_col_offset or 0 :]
    return not before.strip() and not after.strip()


def _cut(node: Definition, lines: list[str]) -> tuple[str, str] | None:
    """Source without decorators and docstring, dedented, and its body; None where lines cannot be cut so."""
    docstring = _docstring(node)
    statements = node.body[1:] if docstring else node.body
    if not statements or statements[0].lineno == node.lineno:
        return None
    dropped = range(0)
    if docstring:
        if not _stands_alone(docstring, lines):
            return None
        dropped = range(docstring.lineno, (docstring.end_lineno or 0) + 1)
    numbers = [n for n in range(node.lineno, (node.end_lineno or 0) + 1) if n not in dropped]
    source = textwrap.dedent("\n".join(lines[n - 1] for n in numbers))
    first = min([statements[0].lineno, *(d.lineno for d in getattr(statements[0], "decorator_list", []))])
    body = "\n".join(lines[n - 1] for n in numbers if n >= first)
    return (source, body) if source.startswith(("def ", "async def ")) else None


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """All functions with their qualified names, in source order, nested ones included."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
        yield from definitions(child, inner)


def parse(text: str) -> ast.Module | None:
    """The source's syntax tree; None where it is no Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            return ast.parse(text)
        except SyntaxError:
            return None


def usable(name: str) -> bool:
    """Whether a name may be asked for: neither dunder nor very short."""
    return len(name) >= MIN_NAME and name.isascii() and not (name.startswith("__") and name.endswith("__"))


def functions(file: SourceFile) -> Iterator[Function]:
    """A file's functions, without dunders and those too short, too long or impossible to cut by lines."""
    tree = parse(file.text)
    if tree is None:
        return
    lines = file.text.split("\n")
    for qualified, node in definitions(tree):
        cut = _cut(node, lines) if usable(node.name) else None
        if cut is None or not MIN_LINES <= cut[0].count("\n") + 1 <= MAX_LINES:
            continue
        blanked, body = (blank_name(part, node.name) for part in cut)
        where = f"{file.path}:{qualified}"
        yield Function(file.package, where, node.name, blanked, "".join(body.split()))
