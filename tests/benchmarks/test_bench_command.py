"""The command line: bad arguments, what help loads, a short real run and its report."""

import math
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks.__main__ import STUDIES, make_parser
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
        (
            [*RUN, "--task", "poetry"],
            "unknown task 'poetry'; known: icons, naming, packages, prose, signature",
        ),
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
        (["pretrain", "--out", "x"], "give exactly one of --minutes and --steps"),
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
        "--eval-examples",
        "48",
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


def documents():
    """Every page and script that shows commands, its continued lines joined."""
    folders = [REPOSITORY, REPOSITORY / "docs", REPOSITORY / "benchmarks"]
    paths = [path for folder in folders for path in (*folder.glob("*.md"), *folder.glob("*.sh"))]
    return {path.name: path.read_text(encoding="utf-8").replace("\\\n", " ") for path in paths}


def test_the_commands_of_every_document_are_understood():
    found = [
        command
        for text in documents().values()
        for command in re.findall(r"^python -m benchmarks ([a-z].*)$", text, flags=re.MULTILINE)
        if "$" not in command  # a line of a loop in the shell
    ]
    assert len(found) > 10
    for command in found:
        make_parser().parse_args(shlex.split(command, comments=True))
    modules = {name for text in documents().values() for name in re.findall(r"-m (benchmarks\.\w+)", text)}
    assert {"benchmarks.gpu_summary"} <= modules
    assert all(find_spec(f"{name}.__main__") for name in modules)


@pytest.mark.parametrize("module", ["benchmarks.curvature", "benchmarks.fisher_distance"])
def test_studies_that_are_run_on_their_own_name_their_arguments(module):
    done = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert done.returncode == 2
    assert f"usage: python -m {module} [-h] --out OUT" in done.stderr
    assert "the following arguments are required: --out" in done.stderr


def test_every_command_belongs_to_one_study():
    names = [command.name for study in STUDIES for command in study.commands]
    assert len(names) == len(set(names)) > 10
    assert all((study.holds is None) == (study.report is None) for study in STUDIES)


def test_a_folder_is_reported_by_the_study_that_wrote_it(tmp_path):
    """A suite's folder has cost files too, and comparison takes every folder that no other study holds."""
    for name in ("cost-naming-grit.json", "suite.json"):
        (tmp_path / name).write_text("{}")
    holding = [study for study in STUDIES if study.holds and study.holds(tmp_path)]
    assert [study.commands[0].name for study in holding] == ["run", "cost", "main"]
