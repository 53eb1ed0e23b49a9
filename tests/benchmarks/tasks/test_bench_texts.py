"""The tasks "prose", "signature" and "packages": what is asked, and that held-out data are apart."""

import ast
import re
from collections import Counter

import pytest

from benchmarks.base_model.corpus import SourceFile
from benchmarks.tasks import packages, prose, signature


def by_split(rows):
    return [[row for row in rows if row.split == name] for name in ("train", "heldout")]


@pytest.fixture(scope="module")
def documents():
    return prose.split_documents()


def all_paragraphs(documents):
    return [prose.normal(part) for document in documents for run in document.runs for part in run]


def test_prose_splits_share_no_topic_and_no_paragraph(documents):
    train, heldout = documents
    assert not {d.name for d in train if d.package == "stdlib"} & {d.name for d in heldout}
    seen, kept = all_paragraphs(train), all_paragraphs(heldout)
    assert len(kept) > 100
    assert not set(seen) & set(kept)
    assert len(seen) == len(set(seen))
    assert len(kept) == len(set(kept))


def test_prose_is_cut_from_whole_topics(documents):
    names = [topic.name for topic in prose.topics()]
    train, heldout = documents
    assert sorted(d.name for d in (*train, *heldout) if d.package == "stdlib") == sorted(names)
    assert {d.package for d in heldout} == {"stdlib"}
    assert len(heldout) >= 10


def test_prose_rows_are_windows_of_their_text(rows_of, tokenizer, documents):
    train, heldout = by_split(rows_of(prose.RECIPE))
    assert {row.package for row in heldout} == {"stdlib"}
    assert all(len(row.prompt) == 1 and 15 <= len(row.answer) <= 63 for row in (*train, *heldout))
    text = "\0".join("\n\n".join(run) for document in documents[1] for run in document.runs)
    for row in heldout[::16]:
        assert tokenizer.decode(row.prompt + row.answer).strip("�") in text


def test_paragraphs_that_repeat_end_a_run():
    documents = [
        prose.Document("p", "a", (("one", "two", "three"),)),
        prose.Document("p", "b", (("four", "two  ", "five"),)),
    ]
    runs = [document.runs for document in prose.unrepeated(documents, {"three"})]
    assert runs == [(("one", "two"),), (("four",), ("five",))]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("This is a sentence that says something in many words, and it goes\non in another line.", True),
        ("Too few words.", False),
        (">>> f(1) and this is a prompt with many words after it to make it long enough", False),
        ("a = b + c * (d - e) / f ** g; h = i[j] @ k // l % m & n | o ^ p << q >> r", False),
        ("The following words introduce a block of code, of which one could say more here::", False),
        (".. note this is a directive with enough words after it to be of a length that counts", False),
    ],
)
def test_prose_of_docstrings(paragraph, expected):
    assert prose.is_prose(paragraph) == expected


SOURCE = '''
class A:
    @decorated
    async def fetch(self, url: str = "x", /, *rest: int, limit=3, **more) -> None:
        """Fetch what the   address names
        and return it.

        More is not read.
        """

    def few(self):
        """Two words."""

    def __len__(self):
        """Count of all the things in it."""
'''


def test_signature_of_a_docstring():
    (made,) = signature.samples(SourceFile("p", "m.py", SOURCE))
    assert made.prompt == "Fetch what the address names and return it.\n<answer>"
    assert made.answer == "async def fetch(self, url, /, *rest, limit, **more):<eos>"
    assert made.origin == "m.py:A.fetch"


def test_signatures_are_python_and_splits_are_apart(rows_of, tokenizer):
    train, heldout = by_split(rows_of(signature.RECIPE))
    assert {row.package for row in train} == set(signature.TRAIN_PACKAGES)
    assert {row.package for row in heldout} == set(signature.HELDOUT_PACKAGES)
    assert not {(row.label, row.body) for row in train} & {(row.label, row.body) for row in heldout}
    assert not {tuple(row.prompt) for row in train} & {tuple(row.prompt) for row in heldout}
    answers = tokenizer.decode_batch([row.answer for row in heldout], skip_special_tokens=False)
    assert answers == [f"{row.label}<eos>" for row in heldout]
    for row in heldout:
        ast.parse(f"{row.label} pass")
    keys = Counter((row.label, row.body) for row in (*train, *heldout))
    assert max(keys.values()) == 1


FILE = """import os
x = one_line_of_code(1)

x = second_line_of_code(2)
x = third_line_of_code(3)
y = numpy_helper(x)
z = alone_here(x)
def f(nx_value):
    return nx_value + nx_other
    more = np.zeros(3)
"""


def test_snippets_stop_at_lines_that_name_a_package():
    assert list(packages.runs(FILE)) == [
        [],
        ["x = one_line_of_code(1)", "x = second_line_of_code(2)", "x = third_line_of_code(3)"],
        ["z = alone_here(x)", "def f(nx_value):", "    return nx_value + nx_other"],
        [],
    ]
    assert list(packages.snippets(FILE)) == [
        "x = one_line_of_code(1)\nx = second_line_of_code(2)\nx = third_line_of_code(3)",
        "z = alone_here(x)\ndef f(nx_value):\n    return nx_value + nx_other",
    ]


def test_packages_are_balanced_and_never_named(rows_of, tokenizer):
    for rows in by_split(rows_of(packages.RECIPE)):
        counts = Counter(row.package for row in rows)
        assert set(counts) == set(packages.PACKAGES)
        assert max(counts.values()) - min(counts.values()) <= 1
        prompts = tokenizer.decode_batch([row.prompt for row in rows], skip_special_tokens=False)
        named = re.compile("|".join(packages.PACKAGES), re.IGNORECASE)
        assert [prompt for prompt in prompts if named.search(prompt)] == []
        answers = tokenizer.decode_batch([row.answer for row in rows], skip_special_tokens=False)
        assert answers == [f" {row.package}<eos>" for row in rows]


def test_packages_splits_share_no_file_and_no_snippet(rows_of, tokenizer):
    train, heldout = by_split(rows_of(packages.RECIPE))
    files = [{(row.package, row.origin.rsplit(":", 1)[0]) for row in rows} for rows in (train, heldout)]
    assert len(files[1]) > 50
    assert not files[0] & files[1]
    assert max(Counter(row.body for row in (*train, *heldout)).values()) == 1
    known = {
        key
        for text in tokenizer.decode_batch([row.prompt for row in heldout])
        for key in packages.line_keys(text)
    }
    for text in tokenizer.decode_batch([row.prompt for row in train]):
        keys = packages.line_keys(text)
        assert 2 * sum(key in known for key in keys) < max(len(keys), 1)
