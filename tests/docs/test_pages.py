"""Every document: lines, links, commands, and code that compiles."""

import ast
import importlib.util
import inspect
import re
import shlex

import pytest
from evidence import RESULTS, make_parser
from pages import DOCUMENTS, ROOT, anchors, blocks, commands, links, page

from grit_optim import GritOptimizer
from grit_optim.__main__ import main as window

WIDTH = 110
GENERATED = ("docs/options.md",)  # written by a command, in lines as long as they come
BY_NAME = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in GENERATED])
def test_lines_fit_the_width(name):
    """Tables and images alone may be wider: Markdown cannot wrap them."""
    lines = page(name).splitlines()
    assert [line for line in lines if len(line) > WIDTH and not line.startswith(("| ", "!["))] == []


def test_the_readme_fits_its_room():
    lines = page("README.md").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("name", BY_NAME)
def test_links_lead_somewhere(name):
    for link in links(page(name)):
        path, _, fragment = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not fragment or fragment in anchors(target.read_text(encoding="utf8")), link


def test_every_page_is_reached_from_the_readme():
    named = {link.partition("#")[0] for link in links(page("README.md"))}
    assert set(BY_NAME) - {"README.md"} <= named
    assert "LICENSE" in named


def test_links_are_seen():
    assert len(links(page("README.md"))) > 10
    assert sum(len(links(page(name))) for name in BY_NAME) > 50


@pytest.mark.parametrize("name", BY_NAME)
def test_python_blocks_compile(name):
    for code in blocks(page(name), "python"):
        compile(code, name, "exec")


@pytest.mark.parametrize("name", BY_NAME)
def test_python_blocks_use_keywords_and_methods_that_exist(name):
    for code in blocks(page(name), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call):
                _check_call(node)


def _check_call(node):
    function = node.func
    if isinstance(function, ast.Name) and function.id == "GritOptimizer":
        known = inspect.signature(GritOptimizer.__init__).parameters
    elif isinstance(function, ast.Attribute) and ast.unparse(function.value) == "optimizer":
        known = inspect.signature(getattr(GritOptimizer, function.attr)).parameters
    else:
        return
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        assert {keyword.arg for keyword in node.keywords} - {None} <= set(known), ast.unparse(node)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_benchmarks_commands_are_understood(name):
    for command in commands(page(name), "python -m benchmarks "):
        words = shlex.split(command.removeprefix("python -m benchmarks "), comments=True)
        if "$" not in command:  # else a shell loop fills the values in
            make_parser().parse_args(words)


def test_there_are_commands_to_understand():
    assert sum(len(commands(page(name), "python -m benchmarks ")) for name in BY_NAME) > 30


@pytest.mark.parametrize("name", BY_NAME)
def test_the_modules_and_commands_named_exist(name):
    for module in set(re.findall(r"python -m (benchmarks\.\w+)", page(name))):
        assert importlib.util.find_spec(module), module
    for command in set(re.findall(r"python -m grit_optim (\w+)", page(name))):
        with pytest.raises(SystemExit) as ended:
            window([command, "--help"])
        assert ended.value.code == 0, command


@pytest.mark.parametrize("script", ["benchmarks/main.sh", "tests/run.sh", "benchmarks/gpu.sh"])
def test_the_readmes_scripts_can_be_run(script):
    assert f"bash {script}" in page("README.md")
    assert (ROOT / script).stat().st_mode & 0o111


def test_the_folders_of_runs_that_the_findings_name_exist():
    named = set(re.findall(r"\(?`((?:[a-z_0-9]+/)?[\w.]+)`", page("docs/findings.md")))
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    cited = {name for name in named if name.partition("/")[0] in folders}
    assert len(cited) >= 12
    assert cited >= {"prototype", "momentum", "short_budgets", "sizes_tries", "truncation"}


def test_no_folder_of_runs_is_without_a_document():
    """Results that no document cites need not be kept."""
    text = "\n".join(page(name) for name in BY_NAME)
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    assert {name for name in folders if not re.search(rf"[`/]{re.escape(name)}[`/)\s:,;]", text)} == set()


def test_the_license_is_the_one_that_is_declared():
    text = (ROOT / "LICENSE").read_text(encoding="utf8")
    assert text.startswith("MIT License\n\nCopyright (c) 2026 the grit_optim authors\n")
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text(encoding="utf8")


def test_the_changelog_has_the_version_of_the_package():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    headings = re.findall(r"^## \[(.+?)\]", page("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert version in headings
