"""The matrix of trainers: every row is a test that exists and a version that is pinned."""

import ast
import re

from pages import ROOT, commands, page, rows, source_of_test

PAGE = page("docs/trainers.md")
ROWS = [cells for cells in rows(PAGE) if re.fullmatch(r"\w+ [\d.]+", cells[1])]
EXTRAS = ("bench", "peers", "trainers", "trainers4")


def part_of_page(title):
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def pins():
    """Package to the versions that the extras pin."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    found = {}
    for extra in EXTRAS:
        listed = re.search(rf"^{extra} = \[\n(.+?)^\]", text, flags=re.MULTILINE | re.DOTALL).group(1)
        for package, version in re.findall(r'"([\w-]+)==([\d.]+)"', listed):
            found.setdefault(package, set()).add(version)
    return found


def test_every_row_names_a_pinned_version_and_a_test_that_exists():
    assert len(ROWS) == 36
    versions = {found.split()[1] for _, found, *_ in ROWS if found.startswith("transformers ")}
    assert versions == pins()["transformers"]
    for client, found, _, test in ROWS:
        package, version = found.split()
        assert version in pins()[package], client
        file, name = test.split("::")
        tree = ast.walk(ast.parse(source_of_test(file)))
        assert name in {node.name for node in tree if isinstance(node, ast.FunctionDef)}, client


def test_every_kind_that_no_tap_sees_has_a_test():
    found = [cells for cells in rows(part_of_page("LoRA that no tap sees")) if "::" in cells[-1]]
    assert len(found) > 10
    for kind, _, test in found:
        file, name = test.split("::")
        tree = ast.walk(ast.parse(source_of_test(file)))
        assert name in {node.name for node in tree if isinstance(node, ast.FunctionDef)}, kind


def test_the_versions_that_exclude_each_other_are_run_by_the_files_of_their_rows():
    """The command for the other environment names every file that a row for it names."""
    (command,) = commands(PAGE, ".venv4/bin/python -m pytest ")
    patterns = command.partition(" -m pytest ")[2].split()
    files = {path.stem for pattern in patterns for path in ROOT.glob(pattern)}
    older = {test.split("::")[0] for _, found, _, test in ROWS if found == "transformers 4.57.6"}
    assert len(older) == 4
    assert older <= files
    assert all(next(ROOT.glob(pattern), None) for pattern in patterns)
