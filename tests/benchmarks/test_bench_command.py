"""The command line: bad arguments, what help loads, a short real run and its report."""

import math
import subprocess
import sys

import pytest

from benchmarks.core.arguments import option
from benchmarks.core.files import REPOSITORY
from benchmarks.core.results import read_results

RUN = ["run", "--optimizers", "adamw", "--lrs", "5e-3", "--out", "never"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["run", "--optimizers", "adamw", "--out", "x"], "required: --lrs"),
        ([*RUN, "--lrs", "foo"], "--lrs: 'foo' is no number"),
        ([*RUN, "--lrs", "-1"], "is not a finite number above 0"),
        ([*RUN, "--lrs", "inf"], "is not a finite number above 0"),
        ([*RUN, "--lrs", "1e-2,,1e-3"], "has an empty item"),
        ([*RUN, "--lrs", "0.01,1e-2"], "names a value twice"),
        ([*RUN, "--seeds", "1.5"], "--seeds: '1.5' is no whole number"),
        ([*RUN, "--seeds", "-1"], "-1 is negative"),
        ([*RUN, "--steps", "0"], "--steps: 0 is not positive"),
        ([*RUN, "--jobs", "0"], "--jobs: 0 is not positive"),
        ([*RUN, "--beta1", "1"], "1 is not in [0, 1)"),
        ([*RUN, "--weight-decay", "nan"], "is not a finite number from 0 up"),
        ([*RUN, "--option", "precondition"], "is not of the form key=value"),
        ([*RUN, "--device", "tpu"], "invalid choice: 'tpu'"),
        ([*RUN, "--task", "poetry"], "unknown task 'poetry'; known: naming, packages, prose, signature"),
        (
            [*RUN, "--data", "squad"],
            "unknown data 'squad'; known: alpaca, alpaca-gpt4, boolq, dolly, gsm8k, qnli",
        ),
        ([*RUN, "--data", "gsm8k="], "'gsm8k=' is not of the form NAME or NAME=FOLDER"),
        ([*RUN, "--data", "gsm8k=no/such/folder"], "cannot read no/such/folder/gsm8k_train.jsonl"),
        ([*RUN, "--data", "gsm8k", "--task", "naming"], "not allowed with argument"),
        ([*RUN, "--data", "gsm8k=x", "--max-length", "0"], "--max-length: 0 is not positive"),
        ([*RUN, "--data", "gsm8k=x", "--max-length", "513"], "the base model reads at most 512 tokens"),
        ([*RUN, "--max-length", "64"], "--max-length is for --data"),
        (["tasks", "--task", "poetry"], "unknown task 'poetry'"),
        ([*RUN, "--optimizers", "sgdx"], "unknown optimizer 'sgdx'; known: adamw, adamw8bit, grit"),
        (["pretrain", "--out", "x"], "one of the arguments --minutes --steps is required"),
        (["pretrain", "--out", "x", "--minutes", "1", "--steps", "1"], "not allowed with argument"),
        (["report", "no/such/folder"], "no such folder: no/such/folder"),
        (["cost", "--optimizer", "sgdx"], "unknown optimizer 'sgdx'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, refusal):
    assert message in refusal(arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", ("a", 1)),
        ("a=0.5", ("a", 0.5)),
        ("a=true", ("a", True)),
        ("a=kfac", ("a", "kfac")),
        ("a=", ("a", "")),
    ],
)
def test_options_are_read_as_json_or_text(text, expected):
    assert option(text) == expected


def test_help_loads_no_package_that_only_some_commands_need():
    code = (
        "import sys, benchmarks.__main__ as m; m.make_parser().format_help(); "
        "heavy = ('transformers', 'peft', 'accelerate', 'bitsandbytes', 'datasets', 'matplotlib', 'rich'); "
        "print([n for n in heavy if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == "[]"


def call(*arguments):
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)


def test_two_steps_from_command_to_table_and_skipping(tmp_path):
    run = [
        "run",
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
    ]
    first = call(*run, "--out", tmp_path)
    assert first.returncode == 0, first.stderr
    (result,) = read_results(tmp_path)
    assert [point["step"] for point in result["curve"]] == [0, 1, 2]
    assert all(math.isfinite(point["loss"]) for point in result["curve"])
    assert result["curve"][2]["loss"] < result["curve"][0]["loss"]
    assert result["final_loss"] == result["curve"][-1]["loss"]
    assert len(result["train_losses"]) == 2
    assert result["optimizer_state_bytes"] > 2 * 4 * 300_000  # two moments of about 0.3 M adapter weights
    assert result["peak_memory_bytes"] > 50_000_000
    assert result["hardware"]["threads"] == 1
    (path,) = tmp_path.glob("*.json")
    before = path.stat().st_mtime_ns
    second = call(*run, "--out", tmp_path)
    assert "1 of 1 runs are in" in second.stdout
    assert path.stat().st_mtime_ns == before
    done = call("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| adamw | 0.005 (single rate) |" in (tmp_path / "table.md").read_text()
