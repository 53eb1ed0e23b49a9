"""The callback in a real Trainer."""

import json

import pytest
import tiny
import torch

from grit_optim import GritOptimizer
from grit_optim.cli.ranks import read_ranks
from grit_optim.cli.run_log import read_run
from grit_optim.integrations.callback import GritCallback

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def examples():
    return [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=16)]


def trainer(model, optimizer, folder, *callbacks):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def test_a_trainers_run_is_logged(tmp_path):
    model = tiny.llama()
    optimizer = tiny.grit(model)
    run = trainer(model, optimizer, tmp_path, GritCallback(every=2, log_fisher_spectrum=True))
    run.train()
    records = [json.loads(line) for line in (tmp_path / "grit.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("step", 4),
        ("end", 4),
    ]
    assert "eigenvalues_a" in records[1]["sites"]
    ranks = json.loads((tmp_path / "grit_final_ranks.json").read_text())
    assert ranks["parameters"] == sum(p.numel() for p in tiny.trained(model))
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    # From the model's output, without any help of the Trainer, which logs the mean of two steps.
    assert (records[1]["loss"] + records[2]["loss"]) / 2 == pytest.approx(logged[0]["loss"], abs=1e-3)
    assert [entry["grit_engaged_sites"] for entry in logged] == [14, 14]
    assert [entry["grit_mean_rank"] for entry in logged] == [4, 4]
    assert logged[-1]["grit_mean_cosine"] < 1
    assert not isinstance(run.optimizer, GritOptimizer), (
        "accelerate has wrapped it, and it was found all the same"
    )


def test_the_loss_of_an_accumulated_step_is_the_trainers(tmp_path):
    """Each micro-batch's output says its share of the step's loss; the last step has fewer of them."""
    model = tiny.llama()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    run = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(),
        optimizers=(tiny.grit(model), None),
        callbacks=[GritCallback(every=1)],
    )
    run.train()
    told = [record["loss"] for record in read_run(tmp_path / "grit.jsonl").steps]
    trainers = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(told) == 3
    assert told == pytest.approx(trainers, abs=1e-3)


def test_an_interrupted_run_that_goes_on_is_recorded_once(tmp_path):
    class Interrupts(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model = tiny.llama()
    optimizer = tiny.grit(model)
    run = trainer(model, optimizer, tmp_path, GritCallback(every=1), Interrupts())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Interrupts)
    run.train()
    assert [record["step"] for record in read_run(tmp_path / "grit.jsonl").steps] == [1, 2, 3, 4, 5, 6]


def test_the_ranks_of_a_trainers_output_can_be_read(tmp_path):
    model = tiny.llama()
    run = trainer(model, tiny.grit(model), tmp_path, GritCallback())
    run.train()
    run.save_model()
    assert {site.rank for site in read_ranks(tmp_path).sites} == {4}


def test_a_trainer_without_grit_is_told_so(tmp_path):
    model = tiny.llama()
    run = trainer(model, torch.optim.AdamW(tiny.trained(model)), tmp_path, GritCallback())
    with pytest.raises(TypeError, match="no GritOptimizer in it; hand the Trainer one"):
        run.train()
