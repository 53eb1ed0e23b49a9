"""Frozen layers that are computed once: equal to the whole model, kept in files, shared, refused if wrong."""

import dataclasses
import json
import multiprocessing

import pytest
import torch
from public_rows import rows, write
from tiny_models import save_model

from benchmarks.__main__ import main
from benchmarks.base_model.source import Source, load_weights
from benchmarks.core.files import BenchmarkError, locked
from benchmarks.core.results import RunConfig, read_results
from benchmarks.cost import on_task
from benchmarks.suite.contenders import cost_name
from benchmarks.tasks.external import DataOptions
from benchmarks.tasks.objective import answer_loss, collate, evaluate
from benchmarks.tasks.registry import Given, load_task
from benchmarks.training import runner
from benchmarks.training.hidden import Stem
from benchmarks.training.train import LORA_TARGETS, Run, train

LAYERS, ADAPTED = 4, 2
CONFIG = RunConfig(
    "gsm8k", "adamw", 1e-2, 0, steps=2, batch_size=3, rank=2, alpha=2, eval_every=2, base="tiny",
    adapted_layers=ADAPTED,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("deep") / "tiny", layers=LAYERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(
        folder / "gsm8k_train.jsonl",
        [{"question": "1 + 1?" * (n % 3 + 1), "answer": f"#### {n}"} for n in range(9)],
    )
    write(folder / "gsm8k_test.jsonl", rows("gsm8k", 100, 3))
    return folder


@pytest.fixture
def given(model, data, tmp_path):
    return Given(Source(str(model), flag="--base", cache=tmp_path / "cache"), DataOptions(data, 150))


@pytest.fixture
def task(given):
    return load_task("gsm8k", given.words(), given.data)


def filled(model):
    """Give every adapter's B, which starts at 0 and would hide A's gradient, values of its own."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.train()


def whole(given, config):
    """The whole model with adapters on its last layers, as PEFT makes it."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(LORA_TARGETS),
        layers_to_transform=list(range(LAYERS - ADAPTED, LAYERS)), layers_pattern="layers",
    )  # fmt: skip
    torch.manual_seed(config.seed)
    return get_peft_model(load_weights(given.source, dtype=torch.float32), lora)


def test_the_loss_its_gradients_and_the_score_are_those_of_the_whole_model(given, task):
    run, other = Run(CONFIG, task, given), whole(given, CONFIG)
    filled(run.model)
    filled(other)
    examples = sorted(task.train, key=len)[1::3]
    assert len({len(example) for example in examples}) > 1  # so that some are padded
    mine, theirs = answer_loss(run.model, run.collate(examples)), answer_loss(other, collate(examples))
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-6)
    mine.backward()
    theirs.backward()
    pairs = [
        {name: p.grad for name, p in one.named_parameters() if p.requires_grad} for one in (run.model, other)
    ]
    assert len(pairs[0]) == ADAPTED * 7 * 2
    assert pairs[0].keys() == pairs[1].keys()
    for name, gradient in pairs[0].items():
        torch.testing.assert_close(gradient, pairs[1][name], rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0
    scores = evaluate(run.model, task.heldout, collate=run.collate), evaluate(other, task.heldout)
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)


def test_the_files_are_made_once_and_a_damaged_one_again(given, task):
    run = Run(CONFIG, task, given)
    run.prepare()
    files = {path: path.stat().st_mtime_ns for path in given.source.cache.rglob("*.npy")}
    met = {*task.heldout, *(e for _, batch in zip(range(2), task.batches(0, 3), strict=False) for e in batch)}
    assert len(files) == len(met)
    assert not train(run)
    again = Run(dataclasses.replace(CONFIG, optimizer="grit"), task, given)
    again.prepare()
    assert again.train_step() == run.losses[0]
    assert {path: path.stat().st_mtime_ns for path in given.source.cache.rglob("*.npy")} == files
    for path in files:
        path.write_bytes(b"")
    assert Run(CONFIG, task, given).train_step() == run.losses[0]


def test_another_number_of_layers_or_precision_has_files_of_its_own(given, task):
    changes = ({}, {"adapted_layers": 1}, {"precision": "bf16"})
    runs = [Run(dataclasses.replace(CONFIG, **change), task, given) for change in changes]
    assert len({run.hidden.folder for run in runs}) == 3
    runs[2].prepare()
    assert runs[2].train_step() == pytest.approx(runs[0].train_step(), rel=0.02)


def _hold(path, taken, done):
    with locked(path, 7):
        taken.set()
        done.wait(60)


def test_a_place_that_another_process_works_at_is_not_taken(tmp_path):
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "claims", taken, done))
    other.start()
    try:
        assert taken.wait(60)
        with locked(tmp_path / "claims", 7, wait=False) as mine:
            assert not mine
        with locked(tmp_path / "claims", 8, wait=False) as mine:
            assert mine
    finally:
        done.set()
        other.join()
    with locked(tmp_path / "claims", 7) as mine:
        assert mine


def test_all_layers_adapted_need_no_files(given, task):
    runs = [Run(dataclasses.replace(CONFIG, adapted_layers=n), task, given) for n in (LAYERS, None)]
    assert [run.hidden for run in runs] == [None, None]
    assert runs[0].train_step() == runs[1].train_step()


def test_what_cannot_be_split_is_refused(given, task):
    with pytest.raises(BenchmarkError, match=r"--adapted-layers 5: the base model has 4 layers"):
        Run(dataclasses.replace(CONFIG, adapted_layers=5), task, given)
    base = load_weights(given.source, dtype=torch.float32)
    stem = Stem(base, ADAPTED)
    tokens = torch.tensor([[5, 6, 7]])
    stem.check(tokens)
    base.get_decoder().register_forward_pre_hook(  # as Gemma does
        lambda module, args, given: (
            args,
            {k: v * 3 if k == "inputs_embeds" else v for k, v in given.items()},
        ),
        with_kwargs=True,
    )
    with pytest.raises(BenchmarkError, match="does not take hidden states in place of embeddings"):
        stem.check(tokens)
    del base.get_decoder().layers
    with pytest.raises(BenchmarkError, match="LlamaModel has no list of decoder layers"):
        Stem(base, 1)


def test_the_command_on_a_folder_and_its_report(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "in_process", lambda call, *arguments: call(*arguments))
    command = [
        "run", "--base", str(model), "--adapted-layers", "2", "--data", f"gsm8k={data}",
        "--max-length", "150", "--train-examples", "6", "--eval-examples", "2", "--optimizers", "adamw,grit",
        "--lrs", "1e-2", "--steps", "2", "--batch-size", "3", "--eval-every", "2", "--warmup", "1",
        "--device", "cpu", "--threads", "1", "--cache", str(tmp_path / "cache"),
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0
    results = read_results(tmp_path / "out")
    assert [(r["config"]["base"], r["config"]["adapted_layers"]) for r in results] == [("tiny", 2)] * 2
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "base model tiny (its last 2 layers)" in capsys.readouterr().out
    assert main(command) == 0  # and does nothing a second time
    assert "2 of 2 runs are in" in capsys.readouterr().out
    assert main([*command[:-2], "--eval-examples", "3", "--out", str(tmp_path / "out")]) == 2
    assert "other data or another base model" in capsys.readouterr().err


def test_a_suite_on_a_folder_and_public_data(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "in_process", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(on_task, "WARMUP", 1)
    base = ["--base", str(model), "--adapted-layers", "2", "--train-examples", "6", "--eval-examples", "2"]
    public = ["--data", f"gsm8k={data}", "--max-length", "150", "--cache", str(tmp_path / "cache")]
    sizes = [
        "--steps", "2", "--explore-steps", "2", "--batch-size", "2", "--warmup", "1", "--seeds", "0",
        "--extensions", "0", "--budget-grid", "0.5", "--shortest-budget", "0.5", "--cost-steps", "1",
    ]  # fmt: skip
    where = ["--device", "cpu", "--threads", "1", "--out", str(tmp_path / "out")]
    command = ["run", "--suite", "peers", "--contenders", "adamw,grit", *base, *public, *sizes, *where]
    assert main(command) == 0, capsys.readouterr().err
    results = read_results(tmp_path / "out")
    assert {(r["config"]["task"], r["config"]["base"], r["config"]["adapted_layers"]) for r in results} == {
        ("gsm8k", "tiny", 2)
    }
    timed = json.loads((tmp_path / "out" / cost_name("gsm8k", "grit")).read_text())
    assert (timed["model"], timed["task"]) == ("tiny", "gsm8k")
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "base model tiny (its last 2 layers)" in capsys.readouterr().out
    assert main([*command, "--tasks", "naming"]) == 2
    assert "--data and --tasks name different data" in capsys.readouterr().err
    for other, name in ((["--eval-examples", "1"], "eval_examples 2"), (["--base", "embedded"], "base tiny")):
        assert main([*command, *other]) == 2
        assert f"holds a suite with {name}" in capsys.readouterr().err
