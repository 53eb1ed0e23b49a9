"""transformers' Trainer with GritOptimizer trains what a hand-written loop trains, and resumes exactly."""

import gc
import weakref

import pytest
import tiny
import torch

from grit_optim import GritOptimizer, for_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf import (  # noqa: E402
    BEST,
    HALF,
    HANDS_OVER_THE_MODEL,
    Agreement,
    Stop,
    assert_close,
    assert_same,
    built,
    engaged,
    losses,
    of_trainer,
    restarted,
    run,
    scrambled,
)

from grit_optim.integrations.callback import GritCallback  # noqa: E402

MODES = {
    "spectral": {},
    "eigenbasis": {"precondition": "eigenbasis"},
    "rank budget": {**HALF, "rank_budget_steps": 4},
}
SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, options):
    saving = {**SAVING, "warmup_steps": 2, "gradient_accumulation_steps": 2}
    whole, optimizer = built(**options)
    run(tmp_path / "whole", whole, (optimizer, None), **saving).train()
    first, interrupted = built(**options)
    run(tmp_path / "part", first, (interrupted, None), callbacks=[Stop(3)], **saving).train()
    second, fresh = built(restarted(), **options)
    run(tmp_path / "part", second, (fresh, None), **saving).train(resume_from_checkpoint=True)
    assert engaged(fresh) == engaged(optimizer)
    assert engaged(fresh)[0] == 6
    assert fresh.ranks() == optimizer.ranks()
    assert (fresh.ranks().parameters < fresh.ranks().parameters_before) == ("rank_budget" in options)
    assert_same(second, whole)


# -------------------------------------------------------------------- built by, or for, the trainer

KEYWORDS = {"lr": 1e-2, "weight_decay": 0.01, "kfac_min_samples": 8}
needs_factories = pytest.mark.skipif(
    not HANDS_OVER_THE_MODEL, reason="transformers before 5.2 does not hand the model to a factory"
)


class BuildsItself(transformers.Trainer):
    """The way of every version, for models that the Trainer builds: its own rate is the optimizer's."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = for_trainer(self.model, **{**KEYWORDS, "lr": self.args.learning_rate})
        return self.optimizer


def by_factory(folder, model, model_init=None, **more):
    given = {"optimizer_cls_and_kwargs": (for_trainer, KEYWORDS), "model_init": model_init}
    return run(folder, model, given=given, **more)


def by_attribute(folder, model, **more):
    trainer = run(folder, model, **more)
    trainer.optimizer = for_trainer(trainer.model, **KEYWORDS)
    return trainer


def by_override(folder, model, model_init=None, **more):
    more = {"learning_rate": KEYWORDS["lr"], **more}
    return run(folder, model, trainer=BuildsItself, given={"model_init": model_init}, **more)


WAYS = [pytest.param(by_factory, marks=needs_factories), by_attribute, by_override]


@pytest.mark.parametrize("way", WAYS)
def test_a_factory_resumes_too_and_equals_the_optimizer_that_was_handed_over(tmp_path, way):
    whole, optimizer = built()
    run(tmp_path / "a", whole, (optimizer, None)).train()
    way(tmp_path / "b", tiny.llama(layers=1), callbacks=[Stop(3)], **SAVING).train()
    again = restarted()
    trainer = way(tmp_path / "b", again, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert engaged(of_trainer(trainer)) == (6, 7)
    assert_same(again, whole)


@pytest.mark.skipif(HANDS_OVER_THE_MODEL, reason="transformers from 5.2 on hands the model to a factory")
def test_a_factory_that_gets_no_model_says_what_to_do(tmp_path):
    with pytest.raises(TypeError, match=r"got a list .*trainer\.optimizer = .*create_optimizer"):
        by_factory(tmp_path, tiny.llama(layers=1)).train()


def initial():
    return tiny.llama(layers=1)


@pytest.mark.parametrize("way", [WAYS[0], by_override])
def test_model_init_builds_model_and_optimizer_anew(tmp_path, way):
    """As a search does: train() again builds a new model and optimizer; nothing is left of the first."""
    trainer = way(tmp_path, None, model_init=initial)
    trainer.train()
    once, first = tiny.weights(trainer.model), weakref.ref(of_trainer(trainer))
    assert engaged(first()) == (6, 7)
    trainer.train()
    optimizer = of_trainer(trainer)
    assert optimizer is not first()
    assert engaged(optimizer) == (6, 7)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(
        map(id, tiny.trained(trainer.model))
    )
    assert all(torch.equal(w, once[n]) for n, w in tiny.weights(trainer.model).items())
    del optimizer
    gc.collect()
    assert first() is None


def test_the_rate_of_a_search_reaches_an_optimizer_that_create_optimizer_builds(tmp_path):
    trainer = by_override(tmp_path, None, model_init=initial)
    for rate in (1e-2, 3e-3):
        trainer.args.learning_rate = rate
        trainer.train()
        assert {group["initial_lr"] for group in of_trainer(trainer).param_groups} == {rate}


def test_model_init_and_a_ready_optimizer_exclude_each_other(tmp_path):
    """Two ways to get it wrong: the Trainer refuses one, and drops the other, which GritCallback says."""
    _, optimizer = built()
    with pytest.raises(RuntimeError, match=r"model_init.*incompatible"):
        run(tmp_path, None, given={"model_init": initial, "optimizers": (optimizer, None)})
    trainer = run(tmp_path, None, given={"model_init": initial}, callbacks=[GritCallback()])
    trainer.optimizer = for_trainer(trainer.model, **KEYWORDS)
    with pytest.raises(TypeError, match="no GritOptimizer in it"):
        trainer.train()


def test_the_factory_splits_its_keywords():
    model = tiny.llama(layers=1)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "norm" in name)
    optimizer = for_trainer()(model, lr=3e-3, weight_decay=0.1, betas=(0.8, 0.9), precondition="steer")
    assert isinstance(optimizer, GritOptimizer)
    assert optimizer.options.preconditioning.precondition == "steer"
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == [
        (3e-3, 0.1, (0.8, 0.9)),
        (3e-3, 0.0, (0.8, 0.9)),
    ]
    with pytest.raises(TypeError, match="weight_decai"):
        for_trainer()(model, lr=3e-3, weight_decai=0.1)
    with pytest.raises(TypeError, match="lr"):
        for_trainer()(model)
    with pytest.raises(TypeError, match=r"got lr and no model; pass the pair"):
        for_trainer(lr=3e-3)
    with pytest.raises(TypeError, match=r"got a list where the model is needed"):
        for_trainer([{"params": tiny.trained(model)}], lr=3e-3)
    with pytest.raises(ValueError, match="requires a gradient"):
        for_trainer()(model.requires_grad_(False), lr=1e-3)


# -------------------------------------------------------------------- what a Trainer does besides


def test_a_schedule_of_ones_own(tmp_path):
    model, optimizer = built()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run(tmp_path, model, (optimizer, schedule)).train()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(1e-2 / 7)
    assert engaged(optimizer) == (6, 7)


@pytest.mark.parametrize("kind", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointed_activations_change_nothing(tmp_path, kind):
    """None is the version's own default: reentrant in transformers 4, not so in 5."""
    plain, optimizer = built()
    accumulating = {"gradient_accumulation_steps": 2}
    run(tmp_path, plain, (optimizer, None), **accumulating).train()
    model, checkpointed = built()
    model.enable_input_require_grads()
    agreement, calls = Agreement(), []
    model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    run(
        tmp_path,
        model,
        (checkpointed, None),
        callbacks=[agreement],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kind,
        **accumulating,
    ).train()
    assert len(calls) == 2 * 12  # 12 micro-batches, each computed twice
    assert engaged(checkpointed) == (6, 7)
    agreement.assert_whole(6)
    assert_close(model, plain, rtol=1e-3, atol=1e-4)


def test_evaluation_in_between_changes_no_bit(tmp_path):
    plain, optimizer = built()
    run(tmp_path, plain, (optimizer, None)).train()
    model, evaluated = built()
    run(tmp_path, model, (evaluated, None), eval_strategy="steps", eval_steps=2).train()
    assert_same(model, plain)


def test_clipping_scales_the_gradients_and_the_taps_still_agree(tmp_path):
    model, optimizer = built()
    agreement = Agreement()
    trainer = run(tmp_path, model, (optimizer, None), callbacks=[agreement], max_grad_norm=1e-3)
    trainer.train()
    assert engaged(optimizer) == (6, 7)
    agreement.assert_whole(6)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(norms) > 1e-3
    assert agreement.ratios == pytest.approx(
        [1e-3 / norm for norm in norms[-len(agreement.ratios) :]], rel=1e-2
    )


def test_bf16_autocast(tmp_path):
    model, optimizer = built()
    trainer = run(tmp_path, model, (optimizer, None), bf16=True)
    trainer.train()
    assert engaged(optimizer) == (6, 7)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_the_best_model_comes_back(tmp_path):
    model, optimizer = built()
    trainer = run(tmp_path, model, (optimizer, None), **BEST)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)
    assert engaged(optimizer) == (6, 7)


# -------------------------------------------------------------------- Seq2SeqTrainer


def t5():
    """An encoder-decoder of 16 sites: 6 in the encoder, 10 in the decoder with its cross-attention."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        vocab_size=tiny.VOCABULARY,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    lora = LoraConfig(
        r=4, lora_alpha=4, target_modules=["q", "k", "v", "o", "wi", "wo"], task_type="SEQ_2_SEQ_LM"
    )
    return get_peft_model(model, lora)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_seq2seq_trainer(tmp_path):
    """An encoder-decoder that stops and generates in between ends as the run that did neither."""
    whole, optimizer = built(t5())
    agreement = Agreement()
    run(tmp_path / "whole", whole, (optimizer, None), kind="Seq2Seq", callbacks=[agreement], **SAVING).train()
    assert engaged(optimizer) == (6, 16)
    agreement.assert_whole(6)
    generating = {**SAVING, "predict_with_generate": True, "eval_strategy": "steps", "eval_steps": 2}
    first, interrupted = built(t5())
    stop = [Stop(3)]
    run(tmp_path / "part", first, (interrupted, None), kind="Seq2Seq", callbacks=stop, **generating).train()
    second, fresh = built(scrambled(t5()))
    trainer = run(tmp_path / "part", second, (fresh, None), kind="Seq2Seq", **generating)
    trainer.train(resume_from_checkpoint=True)
    assert_same(second, whole, matrices=32)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3
    assert evaluated == sorted(evaluated, reverse=True)
