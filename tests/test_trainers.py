"""Accelerate, Lightning and TRL: each trains with GritOptimizer as a hand-written loop does."""

import warnings
from functools import partial

import pytest
import tiny
import torch

from grit_optim import GritOptimizer, for_trainer

STEPS = 4
FACTORY = (for_trainer, {"lr": 1e-2, "kfac_min_samples": 8})


@pytest.fixture(autouse=True)
def _grit_has_nothing_to_say():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(GRIT|Grit).*")
        yield


def built():
    model = tiny.llama(layers=1)
    return model, tiny.grit(model)


def by_hand():
    model, optimizer = built()
    tiny.train(model, optimizer, STEPS)
    return model


def assert_same(one, other):
    ours, theirs = tiny.weights(one), tiny.weights(other)
    assert len(ours) == 14
    assert [n for n, w in ours.items() if not torch.equal(w, list(theirs.values())[list(ours).index(n)])] == []


def engaged(optimizer):
    told = optimizer.telemetry(per_site=False)
    return told["steps"], told["engaged_sites"]


# -------------------------------------------------------------------- accelerate


def accelerated(model, optimizer, accumulate=1):
    accelerate = pytest.importorskip("accelerate")
    # A Trainer in bf16 earlier in this process leaves its precision in accelerate's state and in the environment.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=accumulate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    prepared, stepped, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for seed in range(STEPS * accumulate):
        with accelerator.accumulate(prepared):
            accelerator.backward(tiny.loss_of(prepared, seed // accumulate))
            stepped.step()
            scheduler.step()
            stepped.zero_grad()


def test_accelerate_is_the_hand_written_loop():
    model, optimizer = built()
    accelerated(model, optimizer)
    assert_same(model, by_hand())
    assert engaged(optimizer) == (STEPS, 7)


def test_accelerate_with_accumulation_steps_as_often_as_it_says():
    model, optimizer = built()
    accelerated(model, optimizer, accumulate=2)
    assert engaged(optimizer) == (STEPS, 7)


# -------------------------------------------------------------------- Lightning


def lightning_module(automatic):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.model = tiny.llama(layers=1)

        def configure_optimizers(self):
            self.grit = tiny.grit(self.model)
            return self.grit

        def training_step(self, batch, index):
            loss = tiny.loss_of(self.model, int(batch))
            if not automatic:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    return Module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("automatic", [True, False], ids=["closure", "manual"])
def test_lightning_is_the_hand_written_loop(tmp_path, automatic):
    module = lightning_module(automatic)
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS)))
    assert engaged(module.grit) == (STEPS, 7)
    assert_same(module.model, by_hand())


# -------------------------------------------------------------------- TRL


@pytest.fixture
def trl():
    pytest.importorskip("datasets")
    return pytest.importorskip("trl")


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(tiny.VOCABULARY - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def sentence(seed, length=8):
    return " ".join(f"w{int(i) % 40}" for i in tiny.tokens(seed, 1, length)[0])


def settings(kind, folder, **more):
    return kind(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, logging_steps=1, **more,
    )  # fmt: skip


def peft_config():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def of_trainer(trainer):
    """The GritOptimizer inside what accelerate made of it."""
    assert isinstance(trainer.optimizer.optimizer, GritOptimizer)
    return trainer.optimizer.optimizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["ready", "peft_config"])
def test_sft(trl, tokenizer, tmp_path, way):
    import datasets

    model = tiny.llama(layers=1)
    data = datasets.Dataset.from_list([{"text": sentence(i)} for i in range(16)])
    given = {"optimizers": (tiny.grit(model), None)}
    if way == "peft_config":
        model = model.unload()
        given = {"peft_config": peft_config(), "optimizer_cls_and_kwargs": FACTORY}
    trainer = trl.SFTTrainer(
        model=model, args=settings(trl.SFTConfig, tmp_path, max_length=16), train_dataset=data,
        processing_class=tokenizer, **given,
    )  # fmt: skip
    trainer.train()
    assert engaged(of_trainer(trainer)) == (STEPS, 7)


def with_grit(make, way):
    """DPOTrainer and GRPOTrainer know no ``optimizer_cls_and_kwargs=``; the attribute serves, or a ready PEFT model."""
    model = tiny.llama(layers=1)
    if way == "ready":
        return make(model=model, optimizers=(tiny.grit(model), None))
    trainer = make(model=model.unload(), peft_config=peft_config())
    trainer.optimizer_cls_and_kwargs = FACTORY
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["ready", "peft_config"])
def test_dpo_and_its_reference_stays_out_of_the_factors(trl, tokenizer, tmp_path, way):
    import datasets

    rows = [{"prompt": sentence(i), "chosen": sentence(i + 50, 4), "rejected": sentence(i + 90, 4)} for i in range(16)]
    make = partial(
        trl.DPOTrainer, args=settings(trl.DPOConfig, tmp_path, max_length=32),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    trainer = with_grit(make, way)
    seen = watch_agreement(trainer)
    trainer.train()
    assert engaged(of_trainer(trainer)) == (STEPS, 7)
    assert set(seen) <= {"ok", "unknown"}
    assert "ok" in seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["ready", "peft_config"])
def test_grpo_and_its_generation_stays_out_of_the_factors(trl, tokenizer, tmp_path, way):
    import datasets

    data = datasets.Dataset.from_list([{"prompt": sentence(i)} for i in range(16)])
    make = partial(
        trl.GRPOTrainer, reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions],
        args=settings(trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=6, beta=0.1),
        train_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    trainer = with_grit(make, way)
    seen = watch_agreement(trainer)
    trainer.train()
    assert engaged(of_trainer(trainer)) == (STEPS, 7)
    assert set(seen) <= {"ok", "unknown"}


def watch_agreement(trainer):
    """Collect, before every step, whether taps and gradients agree: a pass too many, or too few, would not."""
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.extend(report.status for report in of_trainer(trainer).check_capture())

    trainer.add_callback(Watch())
    return seen
