"""Public data: formats, local files, the hub's copy, what is left out, and a real run."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import public_rows
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_rows import rows

from benchmarks.base_model.load import EOS, load_tokenizer
from benchmarks.core.files import REPOSITORY, BenchmarkError
from benchmarks.core.results import read_results
from benchmarks.tasks import external, formats
from benchmarks.tasks.external import DATA, DataOptions
from benchmarks.tasks.registry import load_task


def write(folder, name, **splits):
    for split, found in splits.items():
        public_rows.write(folder / f"{name}_{split}.jsonl", found)
    return DataOptions(folder)


def prompts(examples):
    return {example.prompt for example in examples}


HEAD = "Below is an instruction that describes a task"
ONE = f"{HEAD}. Write a response that appropriately completes the request.\n\n"


@pytest.mark.parametrize(
    ("make", "row", "prompt", "answer"),
    [
        (
            formats.gsm8k,
            {"question": "Q?", "answer": "a\n#### 1"},
            "### Instruction:\nQ?\n\n### Response:\n",
            "a\n#### 1",
        ),
        (
            formats.alpaca,
            {"instruction": "I", "input": "", "output": "O"},
            f"{ONE}### Instruction:\nI\n\n### Response:\n",
            "O",
        ),
        (
            formats.dolly,
            {"instruction": "I", "context": "C", "response": "R"},
            "### Instruction:\nI\n\n### Context:\nC\n\n### Response:\n",
            "R",
        ),
        (
            formats.boolq,
            {"question": "is it", "answer": False, "passage": "P"},
            "### Instruction:\nAnswer the question with Yes or No.\nis it?\n\n### Input:\nP\n\n### "
            "Response:\n",
            "No",
        ),
        (
            formats.boolq,
            {"question": "is it?", "answer": "true"},
            "### Instruction:\nAnswer the question with Yes or No.\nis it?\n\n### Response:\n",
            "Yes",
        ),
    ],
)
def test_formats(make, row, prompt, answer):
    assert make(row) == (prompt, answer)


def test_alpaca_with_an_input_says_so():
    prompt, _ = formats.alpaca({"instruction": "I", "input": "X", "output": "O"})
    assert prompt.startswith(f"{HEAD}, paired with an input that provides further context. Write")
    assert prompt.endswith("### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n")


@pytest.mark.parametrize(
    ("label", "answer"), [(0, "Yes"), (1, "No"), ("entailment", "Yes"), ("not_entailment", "No")]
)
def test_qnli_labels(label, answer):
    prompt, found = formats.qnli({"question": "Q", "sentence": "S", "label": label})
    assert found == answer
    assert "### Input:\nQuestion: Q\nSentence: S\n\n" in prompt


@pytest.mark.parametrize("name", DATA)
def test_local_files(name, tmp_path, tokenizer):
    task = load_task(name, tokenizer, write(tmp_path, name, train=rows(name, 0, 20), test=rows(name, 100, 5)))
    assert (task.name, task.metric) == (name, DATA[name].metric)
    assert (len(task.train), len(task.heldout)) == (20, 5)
    assert task.note == f"{name}: 20 training examples (left out: none); 5 held-out examples (left out: none)"
    made = DATA[name].texts(rows(name, 100, 1)[0])
    first = task.heldout[0]
    assert tokenizer.decode(first.prompt) == made[0]
    assert tokenizer.decode(first.answer, skip_special_tokens=False) == made[1] + EOS


def test_metrics_are_accuracy_where_answers_are_labels_and_nothing_where_they_are_free_text():
    found = {name: source.metric for name, source in DATA.items()}
    assert found == {
        **dict.fromkeys(("alpaca", "alpaca-gpt4", "dolly")),
        **dict.fromkeys(("boolq", "qnli"), "accuracy"),
        "gsm8k": "exact match",
    }


def test_train_is_trained_on_and_test_is_reported_on(tmp_path, tokenizer):
    options = write(tmp_path, "gsm8k", train=rows("gsm8k", 0, 9), test=rows("gsm8k", 100, 4))
    task = load_task("gsm8k", tokenizer, options)
    assert all("+ 1" in tokenizer.decode(e.prompt) for e in task.train)
    shown = " ".join(tokenizer.decode(e.prompt) for e in task.heldout)
    assert [f"What is {n} + 1" in shown for n in (0, 8, 100, 103)] == [False, False, True, True]


def test_what_is_left_out_is_counted(tmp_path, tokenizer):
    train = [
        *rows("gsm8k", 0, 6),
        {"question": "long " * 300, "answer": "x"},
        {"question": "q", "answer": " "},
    ]
    options = write(tmp_path, "gsm8k", train=[*train, *rows("gsm8k", 100, 1)], test=rows("gsm8k", 100, 3))
    task = load_task("gsm8k", tokenizer, options)
    assert len(task.train) == 6
    left = "1 of more than 256 tokens, 1 without an answer, 1 that the held-out split asks too"
    assert task.note == f"gsm8k: 6 training examples (left out: {left}); 3 held-out examples (left out: none)"


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12), most=st.integers(1, 80))
def test_length_limit_keeps_exactly_what_fits(lengths, most):
    tokenizer = load_tokenizer()
    texts = [external.Text("x" * n + "\n", "y") for n in lengths]
    sizes = [
        len(tokenizer.encode(text.prompt).ids) + len(tokenizer.encode(text.answer + EOS).ids)
        for text in texts
    ]
    kept, left_out = external.encode(texts, tokenizer, most)
    fitting = [size for size in sizes if size <= most]
    assert [len(example) for example in kept] == fitting
    assert left_out == (
        [f"{len(sizes) - len(fitting)} of more than {most} tokens"] if len(fitting) < len(sizes) else []
    )


def test_data_without_a_test_split_keep_a_share_apart(tmp_path, tokenizer):
    options = write(tmp_path, "dolly", train=[*rows("dolly", 0, 400), *rows("dolly", 0, 400)])
    task = load_task("dolly", tokenizer, options)
    assert len(task.train) + len(task.heldout) == 800
    assert 20 <= len(task.heldout) <= 80
    assert not prompts(task.train) & prompts(task.heldout)
    assert load_task("dolly", tokenizer, options) == task


def test_fingerprint_depends_on_every_example_and_on_the_split(tmp_path, tokenizer):
    def found(train, test):
        return load_task("boolq", tokenizer, write(tmp_path, "boolq", train=train, test=test)).fingerprint

    first, second = rows("boolq", 0, 8), rows("boolq", 100, 8)
    changed = [*first[:-1], first[-1] | {"answer": "false"}]
    assert found(first, second) == found(first, second)
    assert (
        len({found(first, second), found(second, first), found(changed, second), found(first, second[:-1])})
        == 4
    )


@pytest.mark.parametrize(
    ("name", "train", "message"),
    [
        ("gsm8k", "", "gsm8k's train split has no rows"),
        ("gsm8k", "no json\n", r"gsm8k_train.jsonl:1 is no JSON"),
        ("gsm8k", "[1]\n", r"gsm8k_train.jsonl:1 is no JSON object"),
        (
            "gsm8k",
            '\n{"question": "q"}\n',
            "row 1 of gsm8k's train split lacks answer; every row needs: question, answer",
        ),
        ("gsm8k", '{"question": "q", "answer": 3}\n', "row 1 of gsm8k's train split cannot be used"),
        ("boolq", '{"question": "q", "answer": "maybe"}\n', "answer is 'maybe', not one of true, false"),
        ("qnli", '{"question": "q", "sentence": "s", "label": -1}\n', "label is -1, not one of"),
        (
            "gsm8k",
            json.dumps({"question": "q " * 600, "answer": "a"}),
            "a split is empty; give a larger --max-length",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, tokenizer, name, train, message):
    (tmp_path / f"{name}_train.jsonl").write_text(train)
    write(tmp_path, name, test=rows(name, 0, 2))
    with pytest.raises(BenchmarkError, match=message):
        load_task(name, tokenizer, DataOptions(tmp_path))


def test_a_missing_test_file_is_an_error_where_the_data_have_such_a_split(tmp_path, tokenizer):
    with pytest.raises(BenchmarkError, match=r"cannot read .*gsm8k_test.jsonl"):
        load_task("gsm8k", tokenizer, write(tmp_path, "gsm8k", train=rows("gsm8k", 0, 3)))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets` that records its calls; rows of the second split asked for differ."""
    calls = []

    def load_dataset(path, name=None, *, split):
        calls.append((path, name, split))
        short = next(key for key, source in DATA.items() if source.hub == path)
        return rows(short, 100 * len(calls), 60)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca", [("tatsu-lab/alpaca", None, "train")]),
        ("alpaca-gpt4", [("vicgalle/alpaca-gpt4", None, "train")]),
        ("boolq", [("google/boolq", None, "train"), ("google/boolq", None, "validation")]),
        ("dolly", [("databricks/databricks-dolly-15k", None, "train")]),
        ("gsm8k", [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]),
        ("qnli", [("nyu-mll/glue", "qnli", "train"), ("nyu-mll/glue", "qnli", "validation")]),
    ],
)
def test_what_is_asked_of_the_hub(hub, tokenizer, name, expected):
    task = load_task(name, tokenizer, DataOptions())
    assert hub == expected
    assert task.train
    assert task.heldout
    assert len(task.train) + len(task.heldout) == 60 * len(expected)


def test_a_missing_package_is_named_with_the_install_line(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BenchmarkError, match=r"pip install -e '\.\[data\]'.*--data gsm8k=FOLDER"):
        load_task("gsm8k", tokenizer, DataOptions())


def test_a_hub_out_of_reach_names_the_local_way(monkeypatch, tokenizer):
    def load_dataset(*arguments, **keywords):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        BenchmarkError, match=r"cannot get openai/gsm8k .*gsm8k_train.jsonl.*--data gsm8k=FOLDER"
    ):
        load_task("gsm8k", tokenizer, DataOptions())


def test_a_run_on_local_data_from_command_to_result(tmp_path):
    folder, out = tmp_path / "secret_place", tmp_path / "out"
    folder.mkdir()
    long = {"question": "long " * 100, "answer": "true"}
    write(folder, "boolq", train=[*rows("boolq", 0, 40), long], test=rows("boolq", 100, 10))
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "run",
        "--data",
        f"boolq={folder}",
        "--max-length",
        "64",
        "--out",
        out,
    ]
    rest = [
        "--optimizers",
        "adamw",
        "--lrs",
        "5e-3",
        "--steps",
        "2",
        "--eval-every",
        "1",
        "--threads",
        "1",
        "--batch-size",
        "4",
    ]
    done = subprocess.run(
        [*map(str, command), *rest], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "40 training examples (left out: 1 of more than 64 tokens)" in done.stdout
    (result,) = read_results(out)
    assert (result["config"]["task"], result["metric"]) == ("boolq", "accuracy")
    assert result["curve"][2]["loss"] < result["curve"][0]["loss"]
    (path,) = out.glob("boolq-adamw-*.json")
    assert "secret_place" not in path.read_text()


@pytest.mark.skipif(
    "GRIT_BENCH_DATA" not in os.environ, reason="GRIT_BENCH_DATA names no folder with the real files"
)
@pytest.mark.parametrize(
    ("name", "length", "sizes"), [("gsm8k", 512, (7_473, 1_319)), ("boolq", 128, (9_427, 3_270))]
)
def test_the_real_files(name, length, sizes, tokenizer):
    task = load_task(name, tokenizer, DataOptions(Path(os.environ["GRIT_BENCH_DATA"]), length))
    for examples, size in zip((task.train, task.heldout), sizes, strict=True):
        assert 0.97 * size < len(examples) <= size
        assert max(map(len, examples)) <= length
    assert not prompts(task.train) & prompts(task.heldout)
    if name == "gsm8k":
        assert all("\n#### " in tokenizer.decode(example.answer) for example in task.heldout)
