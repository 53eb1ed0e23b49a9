"""The data of the task "naming"."""

import itertools
import re

import pytest

from benchmarks.base_model.load import BLANK
from benchmarks.core.files import BenchmarkError
from benchmarks.tasks import naming
from benchmarks.tasks.embedded import HELDOUT_SIZE
from benchmarks.tasks.registry import load_task
from benchmarks.tasks.task import Example, Task


def split(rows, name):
    return [row for row in rows if row.split == name]


def test_sizes_and_caps(rows):
    train, heldout = split(rows, "train"), split(rows, "heldout")
    assert 600 <= len(heldout) <= HELDOUT_SIZE
    assert 4_000 <= len(train) <= 10_000
    assert max(len(row.answer) for row in rows) <= 16
    for part, share in ((train, 0.45), (heldout, 0.45)):
        packages = [row.package for row in part]
        assert max(map(packages.count, set(packages))) <= share * len(part)


def test_name_never_stands_in_its_prompt(rows, tokenizer):
    prompts = tokenizer.decode_batch([row.prompt for row in rows], skip_special_tokens=False)
    leaks = [
        row.label for row, prompt in zip(rows, prompts, strict=True) if re.search(rf"\b{row.label}\b", prompt)
    ]
    assert leaks == []
    assert all(BLANK in prompt and prompt.endswith("<answer>") for prompt in prompts)


def test_answers_are_the_names(rows, tokenizer):
    answers = tokenizer.decode_batch([row.answer for row in rows], skip_special_tokens=False)
    assert answers == [f" {row.label}<eos>" for row in rows]


def test_splits_share_packages_but_no_file_and_no_body(rows):
    train, heldout = split(rows, "train"), split(rows, "heldout")
    assert {row.package for row in train} == set(naming.PACKAGES)
    assert len({row.package for row in heldout}) > 10
    files = [{(row.package, row.origin.split(":")[0]) for row in part} for part in (train, heldout)]
    assert min(map(len, files)) > 50
    assert not files[0] & files[1]
    assert not {row.body for row in train} & {row.body for row in heldout}
    assert not {tuple(row.prompt) for row in train} & {tuple(row.prompt) for row in heldout}


def test_no_repeats_of_name_and_body(rows):
    keys = [(row.label, row.body) for row in rows]
    assert len(keys) == len(set(keys))


def toy_task(lengths):
    return Task("toy", tuple(Example((1,) * n, (index,)) for index, n in enumerate(lengths)), (), "toy")


def take(task, seed, size, count):
    return list(itertools.islice(task.batches(seed, size), count))


def test_batches_repeat_and_differ_by_seed(naming_task):
    assert take(naming_task, 3, 16, 40) == take(naming_task, 3, 16, 40)
    assert take(naming_task, 3, 16, 40) != take(naming_task, 4, 16, 40)


def test_an_epoch_has_every_example_once():
    batches = take(toy_task(range(1, 101)), 0, 10, 20)
    epochs = [
        sorted(example.answer[0] for batch in batches[i : i + 10] for example in batch) for i in (0, 10)
    ]
    assert epochs == [list(range(100))] * 2
    assert batches[:10] != batches[10:]


@pytest.mark.parametrize("size", [0, 101])
def test_batch_size_out_of_range(size):
    with pytest.raises(
        BenchmarkError, match=f"batch size {size} is not between 1 and the 100 training examples"
    ):
        next(toy_task(range(1, 101)).batches(0, size))


def test_unknown_task(tokenizer):
    with pytest.raises(
        BenchmarkError, match="unknown task 'poetry'; known: icons, naming, packages, prose, signature"
    ):
        load_task("poetry", tokenizer)
