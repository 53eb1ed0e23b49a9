"""The callback in a real Trainer."""

import json

import pytest
import tiny
import torch

from grit_optim import GritOptimizer
from grit_optim.callback import GritCallback

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def examples():
    return [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=16)]


def trainer(model, optimizer, folder, *callbacks):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, logging_steps=2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(), optimizers=(optimizer, None), callbacks=list(callbacks)
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
    ranks = json.loads((tmp_path / "grit_ranks.json").read_text())
    assert ranks["parameters"] == sum(p.numel() for p in tiny.trained(model))
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    # From the model's output, without any help of the Trainer, which logs the mean of two steps.
    assert (records[1]["loss"] + records[2]["loss"]) / 2 == pytest.approx(logged[0]["loss"], abs=1e-3)
    assert [entry["grit_engaged_sites"] for entry in logged] == [14, 14]
    assert [entry["grit_mean_rank"] for entry in logged] == [4, 4]
    assert logged[-1]["grit_mean_cosine"] < 1
    assert not isinstance(run.optimizer, GritOptimizer), "accelerate has wrapped it, and it was found all the same"


def test_a_trainer_without_grit_is_told_so(tmp_path):
    model = tiny.llama()
    run = trainer(model, torch.optim.AdamW(tiny.trained(model)), tmp_path, GritCallback())
    with pytest.raises(TypeError, match="no GritOptimizer in it; hand the Trainer one"):
        run.train()
