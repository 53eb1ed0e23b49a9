"""Both trainers: the same weights, exact resumption, the loss they minimise, and QLoRA."""

import shutil

import pytest
import torch
from finetuning import local_copies, train
from safetensors.torch import load_file

from benchmarks.base_model.source import Source, load_tokenizer
from benchmarks.finetune import batches
from benchmarks.finetune.config import FinetuneConfig
from benchmarks.finetune.data import Origin, load
from benchmarks.finetune.model import load_model
from benchmarks.finetune.output import checkpoints
from benchmarks.finetune.session import Session
from grit_optim import GritOptimizer

pytest.importorskip("accelerate")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other):
    ours, theirs = weights(one), weights(other)
    assert len(ours) == 14
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert any(value.abs().max() > 0 for name, value in ours.items() if "lora_B" in name)


@pytest.fixture
def dolly(tmp_path):
    return local_copies(tmp_path, "dolly")


@pytest.fixture
def started(tiny_model, tmp_path):
    """A function that gives a session on the tiny model and local copies, as the command builds it."""

    def run(name="dolly", **settings):
        local_copies(tmp_path, name)
        few = {
            "rank": 4,
            "alpha": 4,
            "steps": 4,
            "warmup": 1,
            "batch_size": 2,
            "accumulation": 2,
            "max_length": 192,
        }
        config = FinetuneConfig("tiny", name, **{**few, **settings})
        source = Source(str(tiny_model))
        tokenizer = load_tokenizer(source)
        data = load(Origin(name, folder=tmp_path), tokenizer, config)
        return Session(load_model(source, config), tokenizer, data, config, limit=192)

    return run


VARIANTS = {
    "adamw": ["--optimizer", "adamw", "--schedule", "cosine"],
    "grit": ["--optimizer", "grit", "--lr", "1e-2", "--option", "kfac_min_samples=8"],
    "grit-dropout-clip": ["--dropout", "0.2", "--clip", "1e-3", "--schedule", "constant"],
    "grit-bf16": ["--precision", "bf16", "--gradient-checkpointing", "--clip", "0"],
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS.keys())
def test_both_trainers_give_the_same_weights_bit_for_bit(tiny_model, dolly, tmp_path, arguments):
    found = [
        train(tiny_model, dolly, tmp_path / name, "--trainer", name, *arguments) for name in ("hf", "loop")
    ]
    assert_same(tmp_path / "hf", tmp_path / "loop")
    assert found[0]["train_losses"] == found[1]["train_losses"]
    ends = [[point["loss"] for point in metrics["curve"]] for metrics in found]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2


@pytest.mark.parametrize("trainer", ["hf", "loop"])
@pytest.mark.parametrize("kept", [2, 4], ids=["half-way", "before the adapter was saved"])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_model, dolly, tmp_path, trainer, kept):
    arguments = ["--trainer", trainer, "--lr", "1e-2", "--dropout", "0.1", "--option", "kfac_min_samples=8"]
    arguments += ["--save-every", "2", "--eval-every", "2"]
    whole = train(tiny_model, dolly, tmp_path / "whole", *arguments)
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.json"):
        (part / name).unlink()
    for checkpoint in checkpoints(part):
        if int(checkpoint.name.rpartition("-")[2]) > kept:
            (checkpoint / "progress.json").unlink()  # as if the stop had come while it was written
    resumed = train(tiny_model, dolly, part, *arguments, "--resume")
    assert_same(part, tmp_path / "whole")
    assert resumed["train_losses"] == whole["train_losses"]
    assert resumed["step_seconds"][:kept] == whole["step_seconds"][:kept]
    assert [p["step"] for p in resumed["curve"]] == [0, 2, 4]
    assert [p["loss"] for p in resumed["curve"]] == [p["loss"] for p in whole["curve"]]


@pytest.mark.parametrize("trainer", ["hf", "loop"])
def test_a_stop_by_the_user_keeps_what_was_saved(tiny_model, dolly, tmp_path, trainer, monkeypatch, capsys):
    end_step = Session.end_step

    def stop_at_the_third(self):
        diverged = end_step(self)
        if self.record.steps == 3:
            raise KeyboardInterrupt
        return diverged

    monkeypatch.setattr(Session, "end_step", stop_at_the_third)
    arguments = ["--trainer", trainer, "--save-every", "1"]
    assert train(tiny_model, dolly, tmp_path / "out", *arguments, status=130) is None
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "stopped at step 3; checkpoint-2 is kept, --resume goes on"
    monkeypatch.undo()
    train(tiny_model, dolly, tmp_path / "out", *arguments, "--resume")
    train(tiny_model, dolly, tmp_path / "whole", *arguments)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_only_the_last_two_checkpoints_stay(tiny_model, dolly, tmp_path):
    for trainer in ("hf", "loop"):
        train(tiny_model, dolly, tmp_path / trainer, "--trainer", trainer, "--save-every", "1")
        assert [path.name for path in checkpoints(tmp_path / trainer)] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("narrow", [True, False])
def test_the_loss_is_the_mean_over_answer_tokens(started, narrow):
    """Against the model's own loss, one example at a time and without padding."""
    session = started()
    model = session.model.eval()
    examples = session.data.task.train[:5]
    collate = batches.Collator(session.collator.pad, narrow)
    micro = [collate(examples[:2]), collate(examples[2:])]
    total = batches.answer_tokens(micro)
    ours = 0.0
    for batch in micro:
        labels = batch.pop("labels")
        with torch.no_grad():
            ours += float(batches.token_mean(model(**batch), labels, total))
    nats = tokens = 0.0
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        labels = ids.clone()
        labels[:, : len(example.prompt)] = -100
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=labels).loss) * len(example.answer)
        tokens += len(example.answer)
    assert session.collator.narrow
    assert float(total) == tokens
    assert ours == pytest.approx(nats / tokens, rel=1e-5)


def test_accumulated_small_batches_are_one_large_batch(started):
    session = started(dropout=0.0)
    examples = list(session.data.task.train[:8])

    def gradients(parts):
        session.model.zero_grad()
        micro = [session.collator(part) for part in parts]
        total = batches.answer_tokens(micro)
        for batch in micro:
            labels = batch.pop("labels")
            batches.token_mean(session.model(**batch), labels, total).backward()
        return {n: p.grad.clone() for n, p in session.model.named_parameters() if p.grad is not None}

    whole, split = gradients([examples]), gradients([examples[:1], examples[1:4], examples[4:]])
    assert len(whole) == 14
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_rate_rises_from_zero_and_falls(started):
    for schedule, expected in {
        "linear": [0, 0.5, 1, 0.75, 0.5, 0.25, 0],
        "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447, 0],
        "constant": [0, 0.5, 1, 1, 1, 1, 1],
    }.items():
        session = started(schedule=schedule, steps=6, warmup=2, lr=1.0, optimizer="adamw")
        rates = []
        for _ in range(7):
            rates += session.schedule.get_last_lr()
            session.optimizer.step()
            session.schedule.step()
        assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("trainer", ["hf", "loop"])
def test_an_adaptive_budget_hears_the_mean_loss_of_every_step(
    tiny_model, dolly, tmp_path, monkeypatch, trainer
):
    heard, observe = [], GritOptimizer.observe

    def listen(self, loss):
        heard.append(float(loss))
        observe(self, loss)

    monkeypatch.setattr(GritOptimizer, "observe", listen)
    options = {"reprojection": "balanced", "reprojection_freq": 1, "rank_budget": 0.5, "kfac_min_samples": 8}
    options |= {"rank_budget_schedule": "adaptive", "rank_budget_steps": 2, "min_lora_rank": 1}
    arguments = [word for key, value in options.items() for word in ("--option", f"{key}={value}")]
    metrics = train(tiny_model, dolly, tmp_path / "out", "--trainer", trainer, "--lr", "1e-2", *arguments)
    assert [sum(heard[i : i + 2]) / 2 for i in range(0, 8, 2)] == pytest.approx(
        metrics["train_losses"], rel=1e-6
    )
    assert len(heard) == 8


def test_ranks_that_were_given_up_are_not_saved(tiny_model, dolly, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = [
        "reprojection=balanced",
        "reprojection_freq=2",
        "rank_budget=0.5",
        "min_lora_rank=1",
        "kfac_min_samples=8",
    ]
    arguments = [word for option in options for word in ("--option", option)]
    metrics = train(tiny_model, dolly, tmp_path / "out", "--lr", "1e-2", *arguments)
    kept, rank = (
        sum(metrics["ranks"].values()),
        {v.shape[0] for k, v in weights(tmp_path / "out").items() if "lora_A" in k},
    )
    assert kept < 4 * 7
    assert max(rank) <= 4
    assert sum(v.shape[0] for k, v in weights(tmp_path / "out").items() if "lora_A" in k) == kept
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out")
    assert (
        sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) < metrics["trainable_parameters"]
    )


QLORA = {
    "adamw8bit": ["--optimizer", "adamw8bit", "--option", "min_8bit_size=16"],
    "grit": ["--optimizer", "grit", "--option", "kfac_min_samples=8"],
    "adamw-bf16": ["--optimizer", "adamw", "--precision", "bf16"],
    "grit-8bit": ["--optimizer", "grit", "--base", "adamw8bit", "--option", "kfac_min_samples=8"],
}


@pytest.mark.parametrize("arguments", QLORA.values(), ids=QLORA.keys())
def test_qlora_trains_the_same_in_both_trainers(tiny_model, dolly, tmp_path, arguments):
    pytest.importorskip("bitsandbytes")
    for trainer in ("hf", "loop"):
        metrics = train(
            tiny_model, dolly, tmp_path / trainer, "--trainer", trainer, "--quantize", "nf4", "--lr", "1e-2",
            "--gradient-checkpointing", *arguments,
        )  # fmt: skip
        assert metrics["curve"][-1]["loss"] < metrics["curve"][0]["loss"]
    assert_same(tmp_path / "hf", tmp_path / "loop")
    assert "qlora" in (tmp_path / "hf" / "README.md").read_text()


def test_evaluation_leaves_the_gradients_of_a_quantized_model_alone(started):
    """bitsandbytes repacks weights for inference on some CPUs; the packed product passes no gradient on."""
    pytest.importorskip("bitsandbytes")
    session = started(quantize="nf4")
    batch = session.collator(session.data.task.train[:2])
    labels = batch.pop("labels")
    with torch.no_grad():
        for name, p in session.model.named_parameters():
            if "lora_B" in name:
                p.normal_()

    def gradients():
        session.model.zero_grad()
        session.model.train()
        batches.token_mean(session.model(**batch), labels, torch.tensor(1.0)).backward()
        return {n: p.grad.clone() for n, p in session.model.named_parameters() if p.grad is not None}

    before = gradients()
    session.evaluator.measure(generate=True)
    after = gradients()
    assert len(before) == 14
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def test_nf4_keeps_the_frozen_weights_in_four_bits(started):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    session = started(quantize="nf4")
    layers = [m for m in session.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7
    state = layers[0].weight.quant_state
    assert (state.quant_type, state.nested, layers[0].compute_dtype) == ("nf4", True, torch.bfloat16)
    assert {p.dtype for p in session.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_run_that_diverges_says_so_and_saves_no_adapter(tiny_model, dolly, tmp_path, capsys):
    for trainer in ("hf", "loop"):
        out = tmp_path / trainer
        arguments = ["--trainer", trainer, "--optimizer", "adamw", "--lr", "1e30", "--schedule", "constant"]
        metrics = train(tiny_model, dolly, out, *arguments, status=2)
        assert "no finite number any more at step" in capsys.readouterr().err
        assert metrics["diverged"]
        assert metrics["train_losses"][-1] is None
        assert not (out / "adapter_model.safetensors").exists()
