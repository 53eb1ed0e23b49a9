"""What the embedded tasks share: sizes, lengths, fingerprints, pins, cache, choice."""

import dataclasses
import json
import statistics

import pytest

from benchmarks.base_model.load import ANSWER
from benchmarks.core import environment
from benchmarks.core.files import BenchmarkError
from benchmarks.tasks import describe, embedded, icons, naming, packages, prose, signature
from benchmarks.tasks.registry import TASKS

RECIPES = [naming.RECIPE, packages.RECIPE, prose.RECIPE, signature.RECIPE, icons.RECIPE]


def each(test):
    return pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)(test)


def test_every_recipe_is_a_task():
    assert sorted(TASKS) == sorted(recipe.name for recipe in RECIPES)


@each
def test_sizes_and_lengths(recipe, rows_of):
    found = rows_of(recipe)
    splits = [row.split for row in found]
    assert 300 <= splits.count("heldout") <= embedded.HELDOUT_SIZE
    assert 2_500 <= splits.count("train") <= 10_000
    assert len(found) == splits.count("heldout") + splits.count("train")
    assert all(row.prompt and row.answer and len(row.prompt) + len(row.answer) <= 80 for row in found)


@each
def test_splits_share_no_example(recipe, rows_of):
    found = rows_of(recipe)
    prompts = {
        split: {tuple(row.prompt + row.answer) for row in found if row.split == split}
        for split in ("train", "heldout")
    }
    assert not prompts["train"] & prompts["heldout"]


@each
def test_fingerprint_of_the_pinned_versions(recipe, rows_of):
    if others := embedded.unpinned(recipe):
        pytest.skip("; ".join(others))
    assert embedded.fingerprint(rows_of(recipe)) == recipe.expected_fingerprint


def test_tasks_say_what_their_exact_match_is_called():
    assert {recipe.name: recipe.metric for recipe in RECIPES} == {
        "icons": "exact match",
        "naming": "exact match",
        "packages": "accuracy",
        "prose": None,
        "signature": "exact match",
    }


@pytest.mark.filterwarnings("ignore:.* is installed where pyproject", "ignore:Python .* runs where")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "pinned_versions",
            {"sympy": "0.1"},
            r"sympy .* is installed where pyproject.toml pins 0\.1.*task naming may differ",
        ),
        ("python_version", "3.99.1", r"Python 3\.99\.1 runs where the data were fixed with 3\.11\.7"),
    ],
)
def test_a_warning_where_versions_are_not_the_pinned_ones(monkeypatch, name, value, message):
    monkeypatch.setattr(environment, name, lambda: value)
    with pytest.warns(UserWarning, match=message):
        embedded.warn_if_not_pinned(naming.RECIPE)


def test_missing_package_is_named_with_the_remedy(monkeypatch, tokenizer):
    monkeypatch.setattr(environment, "installed_version", lambda name: None if name == "jinja2" else "1.0")
    with pytest.raises(BenchmarkError, match=r"not installed: jinja2;.*pip install -e '\.\[bench\]'"):
        embedded.cache_file(naming.RECIPE, tokenizer)


MADE = [embedded.Row("train", "sympy", "m.py:f", "name", "hash", [5, 6], [7, 1])]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A recipe that costs nothing and counts how often it is followed."""
    built = []
    monkeypatch.setattr(embedded, "warn_if_not_pinned", lambda recipe: None)
    monkeypatch.setenv("GRIT_BENCH_CACHE", str(tmp_path))
    return dataclasses.replace(naming.RECIPE, build=lambda tokenizer: built.append(1) or MADE), built


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
def test_a_damaged_cache_is_made_again(small, tmp_path, tokenizer, damage):
    recipe, built = small
    assert embedded.load_rows(recipe, tokenizer) == MADE
    assert embedded.load_rows(recipe, tokenizer) == MADE
    assert len(built) == 1
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    assert embedded.load_rows(recipe, tokenizer) == MADE
    assert len(built) == 2
    assert embedded.load_rows(recipe, tokenizer) == MADE
    assert len(built) == 2


def test_another_version_or_task_has_another_cache(small, monkeypatch, tokenizer):
    recipe, _ = small
    before = embedded.cache_file(recipe, tokenizer)
    assert embedded.cache_file(packages.RECIPE, tokenizer).name.startswith("packages-")
    monkeypatch.setattr(environment, "installed_version", lambda name: "9.9")
    assert embedded.cache_file(recipe, tokenizer) != before


@pytest.mark.parametrize(
    ("counts", "total", "expected"),
    [
        ({"a": 5, "b": 100, "c": 100}, 65, {"a": 5, "b": 30, "c": 30}),
        ({"a": 2, "b": 3}, 100, {"a": 2, "b": 3}),
        ({"a": 10, "b": 10, "c": 10}, 10, {"a": 3, "b": 3, "c": 4}),
    ],
)
def test_fair_shares(counts, total, expected):
    assert embedded.fair_shares(counts, total) == expected


def test_training_rows_give_way_to_held_out_ones():
    other = dataclasses.replace(MADE[0], body="other", prompt=[5])
    assert embedded.apart({"a": [*MADE, other], "b": MADE}, {"c": MADE}) == {"a": [other], "b": []}
    assert embedded.apart({"a": [other]}, {"c": MADE}, lambda row: row.label) == {"a": []}


def sample(prompt, answer=" f<eos>", origin="m.py:f"):
    return embedded.Sample("sympy", origin, "f", prompt, prompt + ANSWER, answer)


def test_encoding_keeps_what_fits_and_the_first_of_repeats(tokenizer):
    samples = [sample("x " * 200), sample("short"), sample("y", " f" * 20), sample("short", origin="n.py:f")]
    (row,) = embedded.encode("train", samples, tokenizer, max_answer=16)
    best = min((samples[1], samples[3]), key=lambda one: one.rank)
    assert row.origin == best.origin
    assert tokenizer.decode(row.prompt, skip_special_tokens=False) == "short<answer>"
    assert embedded.encode("train", samples[::-1], tokenizer, max_answer=16) == [row]


def test_shortened_prompts_keep_their_beginning_and_the_answer_token(tokenizer):
    (row,) = embedded.encode("train", [sample("x " * 200)], tokenizer, max_answer=16, shorten=True)
    whole = tokenizer.encode("x " * 200).ids
    assert len(row.prompt) + len(row.answer) == embedded.MAX_LENGTH
    assert row.prompt == [*whole[: len(row.prompt) - 1], tokenizer.token_to_id(ANSWER)]


def test_description_of_a_task(naming_task, monkeypatch, capsys):
    small = dataclasses.replace(naming_task, train=naming_task.train[:64], heldout=naming_task.heldout[:16])
    monkeypatch.setattr(describe, "load_task", lambda name, tokenizer: small)
    monkeypatch.setenv("COLUMNS", "200")
    describe.describe(["naming"])
    shown = capsys.readouterr().out
    lengths = statistics.fmean(map(len, small.train))
    assert all(word in shown for word in ("naming", " 64 ", " 16 ", f"{lengths:.1f}", "% (exact match)"))
    assert 0 <= describe.padding_share(small) < 0.3
