"""Cutting functions out of sources: what is kept, and that the name is gone."""

import re

import pytest

from benchmarks.base_model.corpus import SourceFile, is_held_out
from benchmarks.tasks.functions import blank_name, functions

SOURCE = '''
import functools

@functools.cache
def fibonacci(n):
    """fibonacci numbers."""
    # fibonacci of small n
    if n < 2:
        return n
    raise_if("fibonacci failed", fibonacci_limit)
    return fibonacci(n - 1) + fibonacci(n - 2)

class Stack:
    def push_all(self, items):
        def each(item):
            self.items.append(item)
            self.count += 1
            return self
        return [each(item) for item in items]

    def __len__(self):
        a = 1
        b = 2
        return a + b

def no(x):
    a = 1
    b = 2
    return a + b + x

def short(x):
    return x

def one_line_doc(x): "doc"; y = x; z = y; return z
'''


def cut(text):
    return {function.name: function for function in functions(SourceFile("package", "module.py", text))}


def test_kept_functions_are_those_within_the_limits():
    assert set(cut(SOURCE)) == {"fibonacci", "push_all", "each"}


def test_name_docstring_and_decorator_are_gone_and_longer_identifiers_stay():
    found = cut(SOURCE)["fibonacci"]
    assert found.blanked == (
        "def <blank>(n):\n"
        "    # <blank> of small n\n"
        "    if n < 2:\n"
        "        return n\n"
        '    raise_if("<blank> failed", fibonacci_limit)\n'
        "    return <blank>(n - 1) + <blank>(n - 2)"
    )


def test_methods_are_dedented_and_qualified():
    found = cut(SOURCE)
    assert found["push_all"].blanked.startswith("def <blank>(self, items):\n    def each(item):")
    assert found["each"].qualified_name == "module.py:Stack.push_all.each"


def test_body_does_not_depend_on_signature_or_layout():
    one = "def first(a, b):\n    x = a + b\n    y = x * 2\n    return y\n"
    two = "def other(b, a):\n\n    x  = a + b\n    y = x * 2\n    return y\n"
    assert cut(one)["first"].body == cut(two)["other"].body
    assert cut(one)["first"].body != cut(one.replace("* 2", "* 3"))["first"].body


@pytest.mark.parametrize("lines", [3, 4, 20, 21])
def test_limits_on_lines(lines):
    text = "def counted(x):\n" + "    x += 1\n" * (lines - 2) + "    return x\n"
    assert bool(cut(text)) == (4 <= lines <= 20)


def test_docstring_lines_do_not_count():
    text = 'def counted(x):\n    """' + "words\n" * 30 + '    """\n    x += 1\n    x += 2\n    return x\n'
    assert "words" not in cut(text)["counted"].blanked


def test_broken_source_gives_nothing():
    assert cut("def broken(:\n") == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("name(1)", "<blank>(1)"),
        ("rename(name_, _name, name2)", "rename(name_, _name, name2)"),
        ("self.name = f'{name}'", "self.<blank> = f'{<blank>}'"),
        ("naïname", "naïname"),
    ],
)
def test_blank_name_takes_whole_identifiers(source, expected):
    assert blank_name(source, "name") == expected


def test_held_out_share_is_chosen_by_path_alone():
    files = [SourceFile("stdlib", f"folder/module{i}.py", "x") for i in range(5000)]
    chosen = [file.path for file in files if is_held_out(file)]
    changed = [SourceFile("stdlib", file.path, "another text") for file in reversed(files)]
    assert sorted(chosen) == sorted(file.path for file in changed if is_held_out(file))
    assert 0.01 < len(chosen) / len(files) < 0.03


def test_names_with_special_characters_are_taken_literally():
    assert re.fullmatch(r"a \+ <blank>", blank_name("a + b", "b"))
