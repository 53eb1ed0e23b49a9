"""The command line: bad arguments, a short real run, cost, training the base model."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks.base_model import load as base_model
from benchmarks.base_model import pretrain
from benchmarks.core.arguments import option
from benchmarks.core.files import REPOSITORY, BenchmarkError
from benchmarks.core.results import RunConfig, read_results
from benchmarks.cost.measure import abba, measure, quartiles
from benchmarks.tasks import Task
from benchmarks.training.train import Run, train

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


def test_help_loads_nothing_heavy():
    code = (
        "import sys, benchmarks.__main__ as m; m.make_parser().format_help(); "
        "print([n for n in ('torch', 'transformers', 'peft', 'matplotlib', 'grit_optim') if n in sys.modules])"
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


@pytest.fixture(scope="module")
def small_task(naming_task):
    return Task("naming", naming_task.train[:64], naming_task.heldout[:16], "small")


def config(**changes):
    return dataclasses.replace(
        RunConfig("naming", "adamw", 5e-3, 0, steps=3, batch_size=4, eval_every=2), **changes
    )


def test_runs_repeat_and_start_from_the_same_adapter(small_task):
    runs = [Run(config(), small_task), Run(config(), small_task), Run(config(seed=1), small_task)]
    weights = [run.model.state_dict() for run in runs]
    key = next(name for name in weights[0] if "lora_A" in name)
    assert torch.equal(weights[0][key], weights[1][key])
    assert not torch.equal(weights[0][key], weights[2][key])
    assert [train(run) for run in runs[:2]] == [False, False]
    assert runs[0].losses == runs[1].losses
    assert [p["loss"] for p in runs[0].curve] == [p["loss"] for p in runs[1].curve]
    assert [p["step"] for p in runs[0].curve] == [0, 2, 3]


def test_bf16_keeps_the_adapter_in_fp32_and_the_losses_near(small_task):
    runs = [Run(config(precision=precision, eval_every=3), small_task) for precision in ("fp32", "bf16")]
    kinds = {(p.requires_grad, p.dtype) for p in runs[1].model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert [train(run) for run in runs] == [False, False]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=0.01)
    assert runs[0].losses != runs[1].losses


def test_a_curve_without_points_between_is_its_end_alone(small_task):
    run = Run(config(eval_every=3), small_task)
    assert not train(run)
    assert [p["step"] for p in run.curve] == [3]


def test_a_diverged_run_is_recorded_as_such(small_task):
    run = Run(config(lr=1e30), small_task)
    assert train(run)
    result = run.result(True)
    assert result["final_loss"] is None
    assert result["exact_match"] is None
    json.dumps(result, allow_nan=False)


def test_both_lanes_of_the_cost_see_the_same_batches(small_task):
    result = measure(config(steps=20), small_task, 7)
    assert result["ratio"]["q1"] <= result["ratio"]["median"] <= result["ratio"]["q3"]
    assert result["ratio_of_totals"] > 0
    sizes = result["optimizer_state_bytes"]
    assert sizes["plain adamw"] == sizes["optimizer"] > 0


def test_plain_adamw_is_timed_at_a_rate_of_its_own_and_a_diverged_run_not_at_all(small_task, monkeypatch):
    made = []
    monkeypatch.setattr("benchmarks.training.train.Run", lambda *given: made.append(Run(*given)) or made[-1])
    with pytest.raises(
        BenchmarkError, match=r"grit-none at learning rate 1e\+30 diverged while it was timed"
    ):
        measure(config(optimizer="grit-none", lr=1e30, beta1=0.5, steps=20), small_task, 1)
    assert [(run.config.optimizer, run.config.lr, run.config.beta1) for run in made] == [
        ("adamw", 5e-3, 0.9),
        ("grit-none", 1e30, 0.5),
    ]


def test_order_of_blocks_and_quartiles():
    assert abba(3) == [0, 1, 1, 0, 0, 1]
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert quartiles([7.0]) == {"q1": 7.0, "median": 7.0, "q3": 7.0}


@pytest.fixture
def little_data(monkeypatch, tokenizer):
    """A corpus of a few thousand tokens in place of the standard library."""
    texts = ["def add(a, b):\n    return a + b\n" * 40] * 6
    packed = pretrain._pack(tokenizer, texts)
    data = pretrain.Data(tokenizer, packed, packed[:600], {"fingerprint": "x"})
    monkeypatch.setattr(pretrain, "load_data", lambda: data)
    return data


SMALL = pretrain.PretrainConfig(steps=6, batch_size=2, context=32, threads=1)


def test_pretraining_writes_a_model_that_loads(tmp_path, little_data):
    record = pretrain.pretrain(SMALL, tmp_path)
    assert record["steps"] == 6
    assert record["curve"][-1]["train"] < math.log(base_model.VOCABULARY) + 0.5
    assert json.loads((tmp_path / "training_record.json").read_text()) == record
    assert (tmp_path / "model.safetensors").stat().st_size < 10_000_000
    assert not (tmp_path / pretrain.CHECKPOINT).exists()
    model, tokenizer = base_model.load_base_model(tmp_path)
    assert next(model.parameters()).dtype == torch.float32
    loss = pretrain.heldout_loss(model, little_data.heldout, 32)
    assert loss == pytest.approx(record["heldout_loss_of_bf16_file"], abs=1e-4)
    assert tokenizer.encode("<pad><eos><blank><answer>").ids == [0, 1, 2, 3]


def test_pretraining_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path, little_data):
    whole = pretrain._Run(SMALL)
    pretrain._train(whole, little_data, tmp_path / "unused")
    first, batches = pretrain._Run(SMALL), pretrain._Batches(little_data.train, SMALL)
    for _ in range(3):
        first.train_step(batches(first.step))
        first.step += 1
    first.save(tmp_path / pretrain.CHECKPOINT)
    second = pretrain._Run(SMALL)
    second.load(tmp_path / pretrain.CHECKPOINT)
    pretrain._train(second, little_data, tmp_path / "unused")
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, msg=name)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    pretrain._Run(SMALL).save(tmp_path / "checkpoint.pt")
    with pytest.raises(BenchmarkError, match="belongs to another configuration"):
        pretrain._Run(dataclasses.replace(SMALL, seed=1)).load(tmp_path / "checkpoint.pt")


def test_contexts_of_an_epoch_do_not_overlap():
    stream = torch.arange(1000)
    batches = pretrain._Batches(stream, dataclasses.replace(SMALL, batch_size=4, context=9))
    drawn = torch.cat([batches(step) for step in range(24)])
    assert drawn.shape == (96, 10)
    assert len(drawn.unique()) == drawn.numel()
    assert torch.equal(batches(3), batches(3))
    assert not torch.equal(batches(3), batches(3 + 24))


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_missing_base_model_says_how_to_make_it(tmp_path, missing):
    for name in {"tokenizer.json", "config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).write_bytes((base_model.FOLDER / name).read_bytes())
    with pytest.raises(BenchmarkError, match=rf"{missing}.*python -m benchmarks pretrain --out"):
        base_model.load_base_model(tmp_path)
