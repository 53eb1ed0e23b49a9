"""The data of the task "naming"."""

import itertools
import json
import re

import pytest

from benchmarks import environment
from benchmarks.base_model import BLANK
from benchmarks.files import BenchmarkError
from benchmarks.tasks import Example, Task, load_task, naming


def split(rows, name):
    return [row for row in rows if row.split == name]


def test_sizes_and_caps(rows):
    train, heldout = split(rows, "train"), split(rows, "heldout")
    assert len(heldout) == 384
    assert 9_000 <= len(train) <= 10_000
    assert max(len(row.prompt) for row in rows) <= 160
    assert max(len(row.answer) for row in rows) <= 16
    for part, share in ((train, 0.45), (heldout, 0.25)):
        packages = [row.package for row in part]
        assert max(map(packages.count, set(packages))) <= share * len(part)


def test_name_never_stands_in_its_prompt(rows, tokenizer):
    prompts = tokenizer.decode_batch([row.prompt for row in rows], skip_special_tokens=False)
    leaks = [row.name for row, prompt in zip(rows, prompts, strict=True) if re.search(rf"\b{row.name}\b", prompt)]
    assert leaks == []
    assert all(BLANK in prompt and prompt.endswith("<answer>") for prompt in prompts)


def test_answers_are_the_names(rows, tokenizer):
    answers = tokenizer.decode_batch([row.answer for row in rows], skip_special_tokens=False)
    assert answers == [f" {row.name}<eos>" for row in rows]


def test_splits_share_no_package_and_no_body(rows):
    train, heldout = split(rows, "train"), split(rows, "heldout")
    assert {row.package for row in train} == set(naming.TRAIN_PACKAGES)
    assert {row.package for row in heldout} == set(naming.HELDOUT_PACKAGES)
    assert not {row.body for row in train} & {row.body for row in heldout}
    assert not {tuple(row.prompt) for row in train} & {tuple(row.prompt) for row in heldout}


def test_no_repeats_of_name_and_body(rows):
    keys = [(row.name, row.body) for row in rows]
    assert len(keys) == len(set(keys))


def test_fingerprint_of_the_pinned_versions(naming_task):
    packages = [name for name in (*naming.TRAIN_PACKAGES, *naming.HELDOUT_PACKAGES) if name != "stdlib"]
    pins, found = environment.pinned_versions(), environment.require_versions(packages)
    others = {name: version for name, version in found.items() if pins.get(name.lower(), version) != version}
    if others or environment.python_version() != naming.EXPECTED_PYTHON:
        pytest.skip(f"not the pinned versions: Python {environment.python_version()}, {others}")
    assert naming_task.fingerprint == naming.EXPECTED_FINGERPRINT


@pytest.mark.filterwarnings("ignore:.* is installed where pyproject")
def test_a_warning_where_versions_are_not_the_pinned_ones(monkeypatch):
    monkeypatch.setattr(environment, "pinned_versions", lambda: {"sympy": "0.1"})
    with pytest.warns(UserWarning, match=r"sympy .* is installed where pyproject.toml pins 0\.1.*not comparable"):
        naming._warn_if_not_pinned()


def test_missing_package_is_named_with_the_remedy(monkeypatch, tokenizer):
    monkeypatch.setattr(environment, "installed_version", lambda name: None if name == "jinja2" else "1.0")
    with pytest.raises(BenchmarkError, match=r"not installed: jinja2;.*pip install -e '\.\[bench\]'"):
        naming._cache_file(tokenizer)


@pytest.mark.parametrize(
    ("counts", "total", "expected"),
    [
        ({"a": 5, "b": 100, "c": 100}, 65, {"a": 5, "b": 30, "c": 30}),
        ({"a": 2, "b": 3}, 100, {"a": 2, "b": 3}),
        ({"a": 10, "b": 10, "c": 10}, 10, {"a": 3, "b": 3, "c": 4}),
    ],
)
def test_fair_shares(counts, total, expected):
    assert naming.fair_shares(counts, total) == expected


@pytest.fixture
def small_build(monkeypatch, tmp_path):
    """A build that costs nothing and counts how often it is asked for."""
    built = []
    made = [naming.Row("train", "sympy", "m.py:f", "name", "hash", [5, 6], [7, 1])]
    monkeypatch.setattr(naming, "build", lambda tokenizer: built.append(1) or made)
    monkeypatch.setattr(naming, "_warn_if_not_pinned", lambda: None)
    monkeypatch.setenv("GRIT_BENCH_CACHE", str(tmp_path))
    return built, made


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: text.replace("[5, 6]", "[5, 8]"),
        lambda text: "no json\n" + text,
        lambda text: "[]\n" + text,
        lambda text: json.dumps({"fingerprint": 3}) + "\n" + text,
    ],
)
def test_a_damaged_cache_is_made_again(small_build, tmp_path, tokenizer, damage):
    built, made = small_build
    assert naming.rows(tokenizer) == made
    assert naming.rows(tokenizer) == made
    assert len(built) == 1
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    assert naming.rows(tokenizer) == made
    assert len(built) == 2
    assert naming.rows(tokenizer) == made
    assert len(built) == 2


def test_another_version_has_another_cache(small_build, monkeypatch, tokenizer):
    before = naming._cache_file(tokenizer)
    monkeypatch.setattr(environment, "installed_version", lambda name: "9.9")
    assert naming._cache_file(tokenizer) != before


def toy_task(lengths):
    return Task("toy", tuple(Example((1,) * n, (index,)) for index, n in enumerate(lengths)), (), "toy")


def take(task, seed, size, count):
    return list(itertools.islice(task.batches(seed, size), count))


def test_batches_repeat_and_differ_by_seed(naming_task):
    assert take(naming_task, 3, 16, 40) == take(naming_task, 3, 16, 40)
    assert take(naming_task, 3, 16, 40) != take(naming_task, 4, 16, 40)


def test_an_epoch_has_every_example_once():
    batches = take(toy_task(range(1, 101)), 0, 10, 20)
    epochs = [sorted(example.answer[0] for batch in batches[i : i + 10] for example in batch) for i in (0, 10)]
    assert epochs == [list(range(100))] * 2
    assert batches[:10] != batches[10:]


@pytest.mark.parametrize("size", [0, 101])
def test_batch_size_out_of_range(size):
    with pytest.raises(BenchmarkError, match=f"batch size {size} is not between 1 and the 100 training examples"):
        next(toy_task(range(1, 101)).batches(0, size))


def test_unknown_task(tokenizer):
    with pytest.raises(BenchmarkError, match="unknown task 'poetry'; known: naming"):
        load_task("poetry", tokenizer)
