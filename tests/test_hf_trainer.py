"""transformers' Trainer: what it trains with GritOptimizer is what a hand-written loop trains, and it resumes exactly."""

import pytest
import tiny
import torch

from grit_optim import GritOptimizer, for_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

MODES = {"spectral": {}, "eigenbasis": {"precondition": "eigenbasis"}}


def examples(count=32):
    return [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=count)]


def run(folder, model, optimizers=(None, None), kind="", factory=None, callbacks=(), **arguments):
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", **arguments}
    settings = getattr(transformers, f"{kind}TrainingArguments")(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, **arguments
    )
    given = {"optimizer_cls_and_kwargs": factory} if factory else {"optimizers": optimizers}
    return getattr(transformers, f"{kind}Trainer")(
        model=model,
        args=settings,
        train_dataset=examples(),
        eval_dataset=examples(4),
        callbacks=list(callbacks),
        **given,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def engaged(optimizer):
    told = optimizer.telemetry(per_site=False)
    return told["steps"], told["engaged_sites"]


def assert_same(one, other):
    ours, theirs = tiny.weights(one), tiny.weights(other)
    assert len(ours) == 14
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def restarted():
    """The same base model with another adapter, as in a new process that is to load a checkpoint."""
    model = tiny.llama(layers=1)
    with torch.no_grad():
        for p in tiny.trained(model):
            p.normal_()
    return model


def built(model=None, **options):
    model = model or tiny.llama(layers=1)
    return model, tiny.grit(model, **options)


class Stop(transformers.TrainerCallback):
    """An interruption: the run was to go on, so its schedule is the whole run's."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, options):
    saving = {"save_strategy": "steps", "save_steps": 3, "warmup_steps": 2, "gradient_accumulation_steps": 2}
    whole, optimizer = built(**options)
    run(tmp_path / "whole", whole, (optimizer, None), **saving).train()
    assert engaged(optimizer) == (6, 7)
    first, interrupted = built(**options)
    run(tmp_path / "part", first, (interrupted, None), callbacks=[Stop(3)], **saving).train()
    second, fresh = built(restarted(), **options)
    run(tmp_path / "part", second, (fresh, None), **saving).train(resume_from_checkpoint=True)
    assert engaged(fresh) == (6, 7)
    assert_same(second, whole)


def test_a_factory_resumes_too_and_equals_the_optimizer_that_was_handed_over(tmp_path):
    keywords = {"lr": 1e-2, "weight_decay": 0.01, "kfac_min_samples": 8}
    whole, optimizer = built()
    run(tmp_path / "a", whole, (optimizer, None)).train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    run(tmp_path / "b", tiny.llama(layers=1), factory=(for_trainer, keywords), callbacks=[Stop(3)], **saving).train()
    again = restarted()
    trainer = run(tmp_path / "b", again, factory=(for_trainer, keywords), **saving)
    trainer.train(resume_from_checkpoint=True)
    assert engaged(trainer.optimizer.optimizer) == (6, 7)
    assert_same(again, whole)


def test_model_init_works_with_the_factory(tmp_path):
    trainer = run(tmp_path, tiny.llama(layers=1), factory=(for_trainer, {"lr": 1e-2, "kfac_min_samples": 8}))
    trainer.model_init = lambda: tiny.llama(layers=1)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert engaged(optimizer) == (6, 7)
    trained = {id(p) for p in tiny.trained(trainer.model)}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained


def test_a_schedule_of_ones_own(tmp_path):
    model, optimizer = built()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run(tmp_path, model, (optimizer, schedule)).train()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(1e-2 / 7)
    assert engaged(optimizer) == (6, 7)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_activations_change_nothing(tmp_path, reentrant):
    plain, optimizer = built()
    run(tmp_path, plain, (optimizer, None)).train()
    model, checkpointed = built()
    model.enable_input_require_grads()
    run(
        tmp_path, model, (checkpointed, None), gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    ).train()  # fmt: skip
    assert engaged(checkpointed) == (6, 7)
    for name, value in tiny.weights(model).items():
        torch.testing.assert_close(value, tiny.weights(plain)[name], rtol=1e-3, atol=1e-4)


def test_evaluation_and_clipping_in_between(tmp_path):
    """Evaluation enters nothing; clipping scales the gradients, and the taps are not said to disagree."""
    plain, optimizer = built()
    run(tmp_path, plain, (optimizer, None)).train()
    model, evaluated = built()
    run(tmp_path, model, (evaluated, None), eval_strategy="steps", eval_steps=2).train()
    assert_same(model, plain)
    clipped, other = built()
    run(tmp_path, clipped, (other, None), max_grad_norm=1e-3).train()
    assert engaged(other) == (6, 7)


def test_bf16_autocast(tmp_path):
    model, optimizer = built()
    trainer = run(tmp_path, model, (optimizer, None), bf16=True)
    trainer.train()
    assert engaged(optimizer) == (6, 7)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_the_best_model_comes_back(tmp_path):
    model, optimizer = built()
    trainer = run(
        tmp_path, model, (optimizer, None), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)
    assert engaged(optimizer) == (6, 7)


def test_seq2seq_trainer(tmp_path):
    model, optimizer = built()
    trainer = run(tmp_path, model, (optimizer, None), kind="Seq2Seq")
    trainer.train()
    plain, other = built()
    run(tmp_path, plain, (other, None)).train()
    assert_same(model, plain)


def test_the_factory_splits_its_keywords():
    model = tiny.llama(layers=1)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "norm" in name)
    optimizer = for_trainer()(model, lr=3e-3, weight_decay=0.1, betas=(0.8, 0.9), precondition="steer")
    assert isinstance(optimizer, GritOptimizer)
    assert optimizer.options.precondition == "steer"
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == [
        (3e-3, 0.1, (0.8, 0.9)),
        (3e-3, 0.0, (0.8, 0.9)),
    ]
    with pytest.raises(TypeError, match="weight_decai"):
        for_trainer()(model, lr=3e-3, weight_decai=0.1)
    with pytest.raises(TypeError, match="lr"):
        for_trainer()(model)
    with pytest.raises(ValueError, match="requires a gradient"):
        for_trainer()(model.requires_grad_(False), lr=1e-3)
