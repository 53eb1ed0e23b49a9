"""Python sources that are on every machine: the standard library's and those of installed packages."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.files import BenchmarkError, in_share, sha256

# Tests are copies of each other; idlelib and lib2to3 come and go between builds of one Python version;
# encodings and pydoc_data are tables and not code.
_INSTALLED_OR_MADE = {"__pycache__", "dist-packages", "site-packages"}
_UNWANTED_CODE = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "testing", "tests"}
EXCLUDED_FOLDERS = frozenset(_INSTALLED_OR_MADE | _UNWANTED_CODE)


@dataclass(frozen=True)
class SourceFile:
    """One readable source file; `path` is relative to the package, with forward slashes."""

    package: str
    path: str
    text: str


def _wanted(relative: Path) -> bool:
    """Whether a file takes part: not of an excluded folder, nor the build's configuration with its paths."""
    is_configuration = relative.name.startswith("_sysconfigdata") or relative.name == "__config__.py"
    return EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]) and not is_configuration


def _read_tree(package: str, root: Path) -> Iterator[SourceFile]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _wanted(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of sources declare another encoding; they are the same handful everywhere
        yield SourceFile(package, relative.as_posix(), text)


def stdlib_sources() -> list[SourceFile]:
    """Sources of the running interpreter's standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_read_tree("stdlib", root))
    if not files:
        raise BenchmarkError(
            f"no standard library sources in {root}: this Python ships without them; use one that has .py "
            "files"
        )
    return files


def package_sources(package: str) -> list[SourceFile]:
    """Sources of one installed package (its import name), sorted by path."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BenchmarkError(
            f"package {package!r} is not installed, and the benchmark's data are cut from its source; "
            "install it: pip install -e '.[bench]'"
        )
    return list(_read_tree(package, Path(next(iter(spec.submodule_search_locations)))))


def is_held_out(file: SourceFile, percent: int = 2) -> bool:
    """Whether the file belongs to the held-out share, decided by a hash of its path alone."""
    return in_share([file.package, file.path], percent)


def fingerprint(files: list[SourceFile]) -> str:
    """sha256 over packages, paths and texts, in the order given."""
    return sha256(part for file in files for part in (file.package, file.path, file.text))
