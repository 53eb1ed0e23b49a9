"""The command from arguments to folder: what is refused, what is recorded, what can be loaded again."""

import json
import re
import shlex
import shutil
from decimal import Decimal

import pytest
import torch
from finetuning import FEW, ROWS, SHORT, local_copies, train, write

from benchmarks.__main__ import main, make_parser
from benchmarks.core.files import REPOSITORY
from benchmarks.finetune import report, study
from benchmarks.finetune.config import FinetuneConfig, steps_of
from benchmarks.finetune.data import Origin, load
from benchmarks.finetune.evaluate import Evaluator, final_number
from benchmarks.finetune.model import Source, load_model, load_tokenizer
from benchmarks.finetune.session import Record, Session
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


REFUSED = {
    "no model": (["--dataset", "dolly"], "required: --model"),
    "unknown data": (["--model", "embedded", "--dataset", "squad"], "neither known data"),
    "no folder": (["--model", "./nowhere", "--dataset", "dolly"], "no such folder"),
    "trainer": (["--model", "embedded", "--dataset", "dolly", "--trainer", "trl"], "invalid choice: 'trl'"),
    "optimizer": (
        ["--model", "embedded", "--dataset", "dolly", "--optimizer", "adam"],
        "unknown optimizer 'adam'",
    ),
    "base": (
        ["--model", "embedded", "--dataset", "dolly", "--optimizer", "adamw", "--base", "adamw8bit"],
        "only grit can",
    ),
    "base of grit": (["--model", "embedded", "--dataset", "dolly", "--base", "grit-paper"], "is GRIT itself"),
    "length": (
        ["--model", "embedded", "--dataset", "dolly", "--max-length", "600"],
        "reads at most 512 tokens",
    ),
    "warm-up": (
        ["--model", "embedded", "--dataset", "dolly", "--warmup", "200"],
        "leaves no step at the full rate",
    ),
    "steps and epochs": (
        ["--model", "embedded", "--dataset", "dolly", "--steps", "2", "--epochs", "1"],
        "not allowed with",
    ),
    "dropout": (["--model", "embedded", "--dataset", "dolly", "--dropout", "1"], "not below 1"),
    "revision": (
        ["--model", "embedded", "--dataset", "dolly", "--revision", "main"],
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = []

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


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3\n#### 18", 18),
        ("#### 1,234", 1234),
        ("#### $5.50", Decimal("5.5")),
        ("####-7.", -7),
        ("#### 18 #### 19", 18),
        ("#### 70000.00", 70000),
        ("18", None),
        ("#### none", None),
        ("#### ,", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number


@pytest.fixture(scope="module")
def evaluator(tiny_model, tmp_path_factory):
    """A function that gives the evaluator of data on the tiny model."""

    def make(name, count=6, **settings):
        folder = tmp_path_factory.mktemp(name)
        local_copies(folder, name)
        config = FinetuneConfig(
            "tiny", name, rank=4, max_length=192, eval_examples=count, batch_size=4, **settings
        )
        source = Source(str(tiny_model))
        tokenizer = load_tokenizer(source)
        data = load(Origin(name, folder=folder), tokenizer, config)
        return Session(load_model(source, config), tokenizer, data, config, 192).evaluator

    return make


def nats(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return float(model(input_ids=ids, labels=labels).loss) * len(answer)


@torch.no_grad()
def test_accuracy_takes_the_likelier_label(evaluator):
    judge = evaluator("qnli")
    yes, no = judge.data.heldout.labels
    model = judge.model.eval()
    right = [
        (yes if nats(model, e.prompt, yes) < nats(model, e.prompt, no) else no) == e.answer
        for e in judge.data.task.heldout
    ]
    assert judge.measure(False)["accuracy"] == sum(right) / 6


@torch.no_grad()
def test_generation_is_greedy_one_token_at_a_time(evaluator):
    judge = evaluator("gsm8k", max_new_tokens=5)
    prompts = [e.prompt for e in judge.data.task.heldout[:5]]
    made = judge.generate([prompts[0], *(p[:-7] for p in prompts[1:])])
    model = judge.model.eval()
    for prompt, text in zip([prompts[0], *(p[:-7] for p in prompts[1:])], made, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        assert text == judge.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_final_numbers_are_compared_in_the_examples_order(evaluator, monkeypatch):
    judge = evaluator("gsm8k", generate_examples=4)
    answers = judge.data.heldout.answers
    wanted = {e.prompt: a for e, a in zip(judge.data.task.heldout, answers, strict=True)}
    monkeypatch.setattr(
        Evaluator, "generate", lambda self, prompts: ["#### 0", *(wanted[p] for p in prompts[1:])]
    )
    found = judge.measure(True)
    assert (found["final_number_exact_match"], found["generated"]) == (0.75, 4)
    monkeypatch.setattr(Evaluator, "generate", lambda self, prompts: ["no number"] * len(prompts))
    assert judge.measure(True)["final_number_exact_match"] == 0
    assert "final_number_exact_match" not in judge.measure(False)


def test_evaluation_changes_nothing(evaluator):
    judge = evaluator("gsm8k", generate_examples=2, max_new_tokens=3)
    judge.model.train()
    before = {n: p.clone() for n, p in judge.model.named_parameters()}
    state = torch.get_rng_state()
    one, other = judge.measure(True), judge.measure(True)
    assert one == other
    assert judge.model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in judge.model.named_parameters())


def test_a_record_travels_with_its_checkpoint(tmp_path):
    record = Record([1.5, None], [0.1, 0.2], [{"step": 0, "loss": 2.0}])
    record.save(tmp_path)
    assert Record.load(tmp_path) == record
    assert record.diverged
    assert not Record([1.5], [0.1], [{"step": 0, "loss": 2.0}]).diverged
    assert json.loads((tmp_path / "progress.json").read_text())["losses"] == [1.5, None]


# ---------------------------------------------------------------- recipes


def parsed(*arguments):
    given = make_parser().parse_args(["train", "--model", "m", "--dataset", "d", "--out", "o", *arguments])
    study.fill_in(given)
    return given, study.make_config(given, "m", "d", "cpu")


def test_the_librarys_recipe_is_its_examples_configuration():
    given, config = parsed("--recipe", "library")
    assert (config.rank, config.alpha, config.dropout, config.target_modules) == (16, 32, 0.0, "all-linear")
    assert (config.batch_size, config.accumulation, config.lr, given.epochs) == (8, 4, 2e-5, 3)
    assert (config.clip, config.seed, config.optimizer, config.quantize) == (1.5, 42, "grit-paper", "none")


def test_the_studys_recipe_is_its_configuration():
    given, config = parsed("--recipe", "study", "--optimizer", "adamw8bit")
    assert (config.rank, config.alpha, config.dropout, config.quantize) == (16, 16, 0.0, "nf4")
    assert (config.batch_size, config.accumulation, config.steps, given.epochs) == (2, 4, 200, None)
    assert (config.lr, config.weight_decay, config.schedule, config.warmup) == (2e-4, 0.01, "linear", 5)
    assert (config.seed, config.optimizer) == (3407, "adamw8bit")


def test_what_is_given_goes_before_the_recipe():
    given, config = parsed("--recipe", "library", "--lr", "1e-3", "--steps", "7", "--rank", "8")
    assert (config.lr, config.steps, config.rank, config.alpha, given.epochs) == (1e-3, 7, 8, 32, None)
    _, config = parsed("--rank", "8")
    assert (config.alpha, config.weight_decay) == (8, 0.01)


def test_a_recipe_from_command_to_folder(tiny_model, tmp_path):
    out = tmp_path / "out"
    arguments = ["--recipe", "library", "--option", "kfac_min_samples=8", "--option", "kfac_update_freq=1"]
    metrics = train(tiny_model, local_copies(tmp_path, "alpaca-gpt4", train=60, test=8), out, *arguments)
    assert (metrics["config"]["max_length"], metrics["config"]["lr"]) == (192, 2e-5)
    assert metrics["telemetry"]["options"]["pairing"] == "paper"


@pytest.mark.parametrize("document", ["README.md", "docs/finetune.md"])
def test_the_documents_commands_are_ones_that_the_parser_takes(document):
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    commands = re.findall(r"^python -m benchmarks (train .+)$", text, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        make_parser().parse_args(shlex.split(command, comments=True))


def test_the_documents_defaults_are_the_ones_in_the_code():
    text = (REPOSITORY / "docs" / "finetune.md").read_text(encoding="utf-8")
    cells = {
        row[0]: row[1:]
        for row in re.findall(r"^\| (`--.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    }
    columns = [parsed()[1], parsed("--recipe", "library")[1], parsed("--recipe", "study")[1]]
    for option in ("lr", "weight_decay", "quantize"):
        shown = [re.sub(r" \(.*", "", cell) for cell in cells[f"`--{option.replace('_', '-')}`"]]
        for cell, config in zip(shown, columns, strict=True):
            value = getattr(config, option)
            assert (cell if isinstance(value, str) else float(cell)) == value, option
    pairs = {
        "`--schedule`, `--warmup`": ("schedule", "warmup"),
        "`--batch-size`, `--accumulation`": ("batch_size", "accumulation"),
        "`--clip`, `--seed`": ("clip", "seed"),
    }
    for row, names in pairs.items():
        for cell, config in zip(cells[row], columns, strict=True):
            expected = [str(getattr(config, name)) for name in names]
            assert re.sub(r" \(.*", "", cell).split(", ") == expected, row


# ---------------------------------------------------------------- a comparison


def test_report_takes_each_optimizer_at_its_best_rate(tiny_model, tmp_path, capsys, refusal):
    data, runs, found = local_copies(tmp_path, "dolly"), tmp_path / "runs", {}
    for optimizer in ("adamw", "grit"):
        for rate in ("1e-3", "1e-2", "1e-1"):
            arguments = ["--optimizer", optimizer, "--lr", rate, "--steps", "2", "--trainer", "loop"]
            metrics = train(tiny_model, data, runs / f"{optimizer}-{rate}", *arguments)
            found[optimizer, float(rate)] = metrics["curve"][-1]["loss"]
    capsys.readouterr()
    assert main(["report", str(runs)]) == 0
    said = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line for line in said.splitlines() if line.startswith("| ")}
    for optimizer, name in (("adamw", "adamw"), ("grit", "grit over adamw")):
        best = min((loss, rate) for (method, rate), loss in found.items() if method == optimizer)
        end = " (at the end of the rates)" if best[1] != 1e-2 else ""
        assert f"| {best[1]:g}{end} | {best[0]:.4f} (n=1) |" in rows[name]
    assert (runs / "table.md").read_text().strip() == said.strip()
    train(tiny_model, data, runs / "other", "--steps", "2", "--trainer", "loop", "--dropout", "0.1")
    assert "differ in dropout; only alike ones can be compared" in refusal(["report", str(runs)])


def test_the_comparisons_table_is_the_one_that_was_printed():
    folder = REPOSITORY / "benchmarks" / "results" / "qlora"
    found = report.read(folder)
    printed = report.table(found).strip()
    assert (folder / "table.md").read_text(encoding="utf-8").strip() == printed
    assert printed in (REPOSITORY / "docs" / "finetune.md").read_text(encoding="utf-8")
    assert {metrics["code"]["dirty"] for metrics in found} == {False}
