"""The benchmark's source: imports point down, none is hidden or goes round; private names stay private."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.core.files import REPOSITORY

HOUSE = REPOSITORY / "benchmarks"
# From the ground up: a folder may import those before it. Modules beside the folders may import all of them.
FOLDERS = [
    "core",
    "base_model",
    "tasks",
    "peers",
    "training",
    "cost",
    "comparison",
    "suite",
    "adapter_size",
    "truncation",
    "curvature",
    "fisher_distance",
    "rates",
    "finetune",
    "gpu_summary",
]
# Packages that only some commands need, or that take seconds to import.
OPTIONAL = {
    "bitsandbytes",
    "datasets",
    "heavyball",
    "huggingface_hub",
    "matplotlib",
    "PIL",
    "peft",
    "pyarrow",
    "pytorch_optimizer",
    "rich",
    "singd",
    "tokenizers",
    "transformers",
}


def name_of(path):
    """`cost.report` for benchmarks/cost/report.py; "" for benchmarks itself."""
    parts = list(path.relative_to(HOUSE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(HOUSE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def package_of(name):
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


def imports(tree, package):
    """Every module of the house that a source imports; relative imports start at `package`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
                base = ".".join([*kept, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == "benchmarks":
                base = node.module.partition(".")[2]
            else:
                continue
            whole = {f"{base}.{alias.name}".strip(".") for alias in node.names}
            found |= {one if one in MODULES else base for one in whole}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "benchmarks"]
            found |= {name.partition(".")[2] for name in names}
    return found


IMPORTS = {name: imports(tree, package_of(name)) for name, tree in TREES.items()}


def test_the_reading_of_imports_finds_every_form():
    source = "from . import files\nfrom ..core.results import RunConfig\n"
    source += "def f():\n    import benchmarks.cost.count"
    assert imports(ast.parse(source), "core") == {"core.files", "core.results", "cost.count"}
    assert len(MODULES) > 80
    assert sum(map(len, IMPORTS.values())) > 300


def test_every_folder_has_its_place():
    folders = {path.name for path in HOUSE.iterdir() if (path / "__init__.py").exists()}
    assert sorted(folders) == sorted(FOLDERS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    height = {"": len(FOLDERS), "__main__": len(FOLDERS), **{folder: i for i, folder in enumerate(FOLDERS)}}
    place = height[name.split(".")[0]]
    above = {other for other in IMPORTS[name] if height[other.split(".")[0]] > place}
    assert not above, f"{name} imports from a higher folder: {', '.join(sorted(above))}"


def test_no_import_goes_round():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", MODULES)
def test_functions_import_optional_packages_alone(name):
    hidden = []
    for function in ast.walk(TREES[name]):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    hidden += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    hidden.append("." * node.level + (node.module or ""))
    assert {one.split(".")[0] for one in hidden} <= OPTIONAL


def is_own(attribute):
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")


def private_names():
    """Underscored names of the house: functions, classes, constants, attributes of its classes."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
                found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


PRIVATE = private_names()


@pytest.mark.parametrize("path", [*MODULES.values(), *sorted(Path(__file__).parent.rglob("*.py"))], ids=str)
def test_nobody_reads_a_private_name_of_another(path):
    assert len(PRIVATE) > 100
    read = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            read += [] if is_own(node) else [f"line {node.lineno}: {ast.unparse(node)}"]
        elif isinstance(node, ast.ImportFrom):
            read += [
                f"line {node.lineno}: import {alias.name}" for alias in node.names if alias.name in PRIVATE
            ]
    assert read == []
