"""The command from arguments to folder: what is refused, what is recorded, what can be loaded again."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from finetuning import FEW, SHORT, local_copies, train
from public_rows import ROWS, write

from benchmarks.base_model.source import Source, load_tokenizer
from benchmarks.finetune.config import FinetuneConfig, steps_of
from benchmarks.finetune.data import Origin, load
from benchmarks.finetune.model import load_model
from benchmarks.training.optimizers import OPTIMIZERS

pytest.importorskip("accelerate")


@pytest.mark.parametrize("name", ROWS)
def test_every_dataset_from_command_to_folder(tiny_model, tmp_path, name):
    from huggingface_hub import ModelCard

    out = tmp_path / "out"
    (tmp_path / "secret_place").mkdir()
    metrics = train(tiny_model, local_copies(tmp_path / "secret_place", name), out, "--trainer", "loop")
    first, last = metrics["curve"]
    assert (first["step"], last["step"]) == (0, 4)
    assert (("accuracy" in last), ("final_number_exact_match" in last)) == (
        name in ("boolq", "qnli"),
        name == "gsm8k",
    )
    assert metrics["data"]["argument"] == f"{name}=FOLDER"
    assert len(metrics["step_seconds"]) == len(metrics["train_losses"]) == 4
    assert len(metrics["ranks"]) == 7
    assert metrics["optimizer_state_bytes"] > 0 < metrics["peak_memory_bytes"]
    for file in ("metrics.json", "run.json", "README.md"):
        text = (out / file).read_text()
        assert str(tmp_path) not in text
        assert "secret_place" not in text
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.datasets) == (
        "peft",
        tiny_model.name,
        [metrics["data"]["hub"]],
    )
    assert {"lora", "grit"} <= set(card.data.tags)
    assert f"| {first['loss']:.4f} | {last['loss']:.4f} |" in card.text


def test_the_saved_adapter_and_tokenizer_give_the_loss_that_was_reported(tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    metrics = train(
        tiny_model, local_copies(tmp_path, "dolly"), out, "--lr", "1e-2", "--rslora", "--alpha", "8"
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = FinetuneConfig(**metrics["config"])
    data = load(Origin("dolly", folder=tmp_path), tokenizer, config)
    nats = tokens = 0.0
    for example in data.task.heldout:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        labels = ids.clone()
        labels[:, : len(example.prompt)] = -100
        nats += float(model(input_ids=ids, labels=labels).loss) * len(example.answer)
        tokens += len(example.answer)
    assert nats / tokens == pytest.approx(metrics["curve"][-1]["loss"], rel=1e-4)


def test_a_file_of_ones_own_with_a_chat_template(tiny_model, tmp_path):
    talks = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(60)
    ]
    train_file, held = write(tmp_path / "talks.jsonl", talks[:40]), write(tmp_path / "held.jsonl", talks[40:])
    metrics = train(tiny_model, train_file, tmp_path / "out", "--eval-data", str(held))
    assert (metrics["data"]["argument"], metrics["data"]["training"]) == ("talks.jsonl", 40)
    assert metrics["config"]["dataset"] == "talks"
    assert set(metrics["curve"][-1]) == {"step", "seconds", "loss", "perplexity"}


OBJECTS_IN_STATE = {"shampoo-full", "shampoo-rank", "singd"}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"grit", "adamw", "adamw8bit"}))
def test_every_optimizer_of_the_registry_trains_and_resumes_or_says_that_it_cannot(
    tiny_model, tmp_path, name, capsys
):
    data = local_copies(tmp_path, "dolly", train=20, test=4)
    arguments = [
        "--optimizer",
        name,
        "--trainer",
        "loop",
        "--lr",
        "1e-3",
        "--steps",
        "2",
        "--save-every",
        "1",
    ]
    whole = train(tiny_model, data, tmp_path / "out", *arguments)
    assert not whole["diverged"]
    (tmp_path / "out" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    assert ("its runs cannot be resumed" in capsys.readouterr().out) == (name in OBJECTS_IN_STATE)
    if name in OBJECTS_IN_STATE:
        train(tiny_model, data, tmp_path / "out", *arguments, "--resume", status=2)
        assert "start anew with --overwrite" in capsys.readouterr().err
        return
    resumed = train(tiny_model, data, tmp_path / "out", *arguments, "--resume")
    assert resumed["train_losses"] == whole["train_losses"]


def test_epochs_count_whole_passes():
    config = FinetuneConfig("m", "d", batch_size=4, accumulation=2)
    assert [steps_of(epochs, 80, config) for epochs in (0.01, 1, 2.5)] == [1, 10, 25]


EMBEDDED = ["--model", "embedded", "--dataset", "dolly"]
REFUSED = {
    "no model": (["--dataset", "dolly"], "required: --model"),
    "unknown data": (["--model", "embedded", "--dataset", "squad"], "neither known data"),
    "no folder": (["--model", "./nowhere", "--dataset", "dolly"], "no such folder"),
    "trainer": ([*EMBEDDED, "--trainer", "trl"], "invalid choice: 'trl'"),
    "optimizer": (
        [*EMBEDDED, "--optimizer", "adam"],
        "unknown optimizer 'adam'",
    ),
    "base": (
        [*EMBEDDED, "--optimizer", "adamw", "--base", "adamw8bit"],
        "only grit can",
    ),
    "base of grit": ([*EMBEDDED, "--base", "grit-paper"], "is GRIT itself"),
    "length": (
        [*EMBEDDED, "--max-length", "600"],
        "reads at most 512 tokens",
    ),
    "warm-up": (
        [*EMBEDDED, "--warmup", "200"],
        "leaves no step at the full rate",
    ),
    "steps and epochs": (
        [*EMBEDDED, "--steps", "2", "--epochs", "1"],
        "not allowed with",
    ),
    "dropout": ([*EMBEDDED, "--dropout", "1"], "not below 1"),
    "revision": (
        [*EMBEDDED, "--revision", "main"],
        "for a model from the hub",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(refusal, tmp_path, arguments, message):
    assert message in refusal(["train", *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refusal(["train", "--model", "embedded", "--dataset", "dolly", "--out", str(tmp_path / "out")])
    assert "runs in one process" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "no_such=1"], "--optimizer grit cannot be built"),
        (["--option", "kfac_damping=-1"], "kfac_damping"),
        (["--target-modules", "nothing_like_it"], "--target-modules nothing_like_it"),
        (["--batch-size", "99"], "batch size 99 is not between 1 and the 40 training examples"),
    ],
)
def test_what_the_model_or_data_cannot_do(refusal, tiny_model, tmp_path, arguments, message):
    command = [
        "train",
        "--model",
        str(tiny_model),
        "--dataset",
        local_copies(tmp_path, "dolly"),
        *SHORT,
        *FEW,
    ]
    assert message in refusal([*command, "--out", str(tmp_path / "out"), *arguments])


def test_a_hub_out_of_reach_names_the_model_and_the_folder_way(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refusal(
        ["train", "--model", "some-one/some-model", "--dataset", "dolly", "--out", str(tmp_path / "out")]
    )
    assert "cannot load the tokenizer of some-one/some-model" in said
    assert "HF_TOKEN" in said
    assert "--model FOLDER" in said


def test_data_out_of_reach_name_the_local_way(refusal, tiny_model, tmp_path):
    pytest.importorskip("datasets")
    said = refusal(
        ["train", "--model", str(tiny_model), "--dataset", "gsm8k", "--out", str(tmp_path / "out")]
    )
    assert "cannot get openai/gsm8k from the hub" in said
    assert "--dataset gsm8k=FOLDER" in said


def test_what_the_hub_is_asked_for(monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    asked = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: SimpleNamespace())  # no vision part

    def from_pretrained(model, **keywords):
        asked.append((model, keywords["revision"], keywords["trust_remote_code"]))
        raise OSError("far away")

    for kind in (AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    for source in (Source("a/b"), Source("a/b", "v1", True)):
        for call in (load_tokenizer, lambda source: load_model(source, FinetuneConfig("a/b", "d"))):
            with pytest.raises(Exception, match=r"cannot load the (tokenizer|model) of a/b \(far away\)"):
                call(source)
    assert asked == [("a/b", "main", False)] * 2 + [("a/b", "v1", True)] * 2


def test_a_folder_that_lacks_the_model(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal(
        ["train", "--model", str(tmp_path / "empty"), "--dataset", "dolly", "--out", str(tmp_path / "out")]
    )
    assert "the folder must hold what save_pretrained writes" in said


def test_a_folder_with_a_run_is_only_touched_when_asked(refusal, tiny_model, tmp_path, capsys):
    data, out = local_copies(tmp_path, "dolly"), tmp_path / "out"
    command = ["train", "--model", str(tiny_model), "--dataset", data, "--out", str(out), *SHORT, *FEW]
    first = train(tiny_model, data, out)
    assert "holds a finished run; --resume goes on with it, --overwrite deletes it" in refusal(command)
    assert "cannot be resumed so: seed (42 → 7)" in refusal([*command, "--resume", "--seed", "7"])
    assert "exclude each other" in refusal([*command, "--resume", "--overwrite"])
    assert train(tiny_model, data, out, "--resume") == first
    assert "finished; nothing is left to do" in capsys.readouterr().out
    assert "cannot be built" in refusal([*command, "--overwrite", "--option", "no_such=1"])
    assert (out / "adapter_model.safetensors").exists()
    again = train(tiny_model, data, out, "--overwrite", "--seed", "7")
    assert again["config"]["seed"] == 7
    (out / "metrics.json").unlink()
    assert "holds an unfinished run" in refusal(command)
    local_copies(tmp_path, "dolly", train=39)
    assert "cannot be resumed so: data" in refusal([*command, "--resume", "--seed", "7"])


def test_a_folder_with_other_files_is_left_alone(refusal, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    command = [
        "train",
        "--model",
        str(tiny_model),
        "--dataset",
        local_copies(tmp_path, "dolly"),
        "--overwrite",
    ]
    assert "holds no run of this command" in refusal([*command, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert "is a file; name a folder" in refusal([*command, "--out", str(tmp_path / "out" / "README.md")])
