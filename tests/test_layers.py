"""The order of the rooms: imports point down only, and the package loads torch alone."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import grit_optim

ROOT = Path(grit_optim.__file__).parent
# From the ground up; a name is a folder or a file at the top.
ORDER = (
    *("linalg", "messages", "integrity", "options", "presets", "profiling", "schedules"),
    *("processes", "lora", "base", "capture", "curvature", "rank", "preconditioners", "checkpoints", "parts"),
    *("export", "sinks", "telemetry", "optimizer", "integrations", "callback", "cli", "__init__", "__main__"),
)
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")
}


def imported(tree):
    """Modules of the package that a file imports, wherever in it, each as ``folder.file``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "grit_optim":
            module = (node.module or "").removeprefix("grit_optim").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found = next((n for n in (inner, module, f"{module}.__init__") if n in FILES), None)
                yield found or f"{inner}.__init__"
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("grit_optim.") for a in node.names if a.name.startswith("grit_optim.")
            )


EDGES = {name: set(imported(ast.parse(path.read_text(encoding="utf8")))) for name, path in FILES.items()}


def room(module):
    return module.split(".")[0]


def test_every_room_has_its_place_and_ten_files_stand_at_the_top():
    assert {room(name) for name in FILES} == set(ORDER)
    assert len(list(ROOT.glob("*.py"))) <= 10


def test_imports_point_down_between_the_rooms():
    edges = [(name, other) for name, others in EDGES.items() for other in others]
    assert len(edges) > 100
    assert {other for _, other in edges} <= set(FILES)
    upwards = [(a, b) for a, b in edges if ORDER.index(room(a)) < ORDER.index(room(b))]
    assert upwards == []


def test_no_import_goes_round():
    TopologicalSorter(EDGES).prepare()  # raises with the circle if there is one


@pytest.mark.parametrize("name", FILES)
def test_imports_of_the_package_stand_at_the_top_of_a_file(name):
    """None is hidden in a function to break a circle."""
    tree = ast.parse(FILES[name].read_text(encoding="utf8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [other for function in functions for other in imported(function)] == []


HOUSE = ROOT.parent
SOURCES = [*FILES.values(), *(HOUSE / "benchmarks").rglob("*.py"), *(HOUSE / "tests").rglob("*.py")]


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_private_names():
    """What the house itself defines with an underscore: functions, classes, and attributes of ``self``."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and private(node.name):
                yield node.name
            stored = (
                isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and private(node.attr)
            )
            if stored and ast.unparse(node.value) == "self":
                yield node.attr


OURS = set(own_private_names())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_nobody_reads_the_underscore_of_another(path):
    """``self._x`` is one's own. One file of the tests may: it shows the others what they need."""
    read = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(node, ast.Attribute)
        and private(node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert len(OURS) > 100
    assert read & OURS == set() or path == HOUSE / "tests" / "support.py"


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_files_and_functions_are_short(path):
    """Docstrings, which grow with what there is to say, are not counted."""
    text = path.read_text(encoding="utf8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (
                len(ast.get_docstring(node, clean=False).splitlines()) if ast.get_docstring(node) else 0
            )
            assert node.end_lineno - node.lineno + 1 - docstring <= 60, node.name


def test_only_one_module_issues_warnings():
    """A count of frames, written elsewhere, would be wrong after the next refactoring."""
    assert {name for name, path in FILES.items() if "warnings.warn(" in path.read_text("utf8")} == {
        "messages"
    }


def test_a_mode_answers_for_itself():
    """No mode is asked for by its name outside its own file, but where names are written down."""
    asking = {
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.Compare) and "precondition" in ast.unparse(node.left).split(".")[-1]
    }
    assert asking == set()


def test_few_files_know_peft():
    """PEFT's names for its attributes stand in one file, those of its tensors in another."""
    words = ("lora_embedding", "import peft\n", "from peft import", "lora_A.weight")
    knowing = {name for name, path in FILES.items() if any(word in path.read_text("utf8") for word in words)}
    assert knowing == {"lora.discovery", "lora.site", "export.adapter", "export.files"}


def test_importing_loads_nothing_heavier_than_torch():
    heavier = [
        "peft",
        "transformers",
        "matplotlib",
        "rich",
        "tensorboard",
        "wandb",
        "bitsandbytes",
        "safetensors",
    ]
    code = "import sys, grit_optim; print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code, *heavier], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
