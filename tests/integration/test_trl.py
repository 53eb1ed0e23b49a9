"""TRL: supervised, preference and reinforcement training. Passes without a gradient leave no statistics."""

import pytest
import tiny
import torch
from packaging.version import Version

from grit_optim import for_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from hf import (  # noqa: E402
    HANDS_OVER_THE_MODEL,
    Agreement,
    Stop,
    assert_same,
    engaged,
    of_trainer,
    scrambled,
)
from peft import LoraConfig  # noqa: E402

STEPS = 4
KEYWORDS = {"lr": 1e-2, "kfac_min_samples": 8}
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:.*(GRIT|Grit).*"),
]


@pytest.fixture(scope="module")
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


def rewards(completions, **_):
    """Anything that differs between completions."""
    return [float(len(completion) % 7) for completion in completions]


# Per kind of training: the trainer's name, its own settings, what else it is given, and a row of its data.
KINDS = {
    "SFT": ({"max_length": 16}, {}, lambda i: {"text": sentence(i)}),
    "DPO": (
        {"max_length": 32},
        {},
        lambda i: {"prompt": sentence(i), "chosen": sentence(i + 50, 4), "rejected": sentence(i + 90, 4)},
    ),
    "GRPO": (
        {"num_generations": 4, "max_completion_length": 6, "beta": 0.1},
        {"reward_funcs": rewards},
        lambda i: {"prompt": sentence(i)},
    ),
}


def started(kind, way, folder, tokenizer, callbacks=(), **arguments):
    """A trainer that is ready to train, on a PEFT model or on one that the trainer adapts."""
    own, given, row = KINDS[kind]
    model = tiny.llama(layers=1)
    if way == "ready":
        given = {**given, "optimizers": (tiny.grit(model), None)}
    else:
        model = model.unload()
        lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        given = {**given, "peft_config": lora}
    arguments = {"save_strategy": "no", **own, **arguments}
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        seed=0,
        **arguments,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list([row(i) for i in range(16)]),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **given,
    )
    if way == "factory":  # SFTTrainer takes it as an argument too, the others do not
        trainer.optimizer_cls_and_kwargs = (for_trainer, KEYWORDS)
    elif way == "peft_config":
        trainer.optimizer = for_trainer(trainer.model, **KEYWORDS)
    return trainer


WAYS = [
    "ready",
    "peft_config",
    pytest.param(
        "factory",
        marks=pytest.mark.skipif(
            not HANDS_OVER_THE_MODEL, reason="transformers before 5.2 does not hand the model to a factory"
        ),
    ),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_taps_and_gradients_see_the_same(kind, way, tokenizer, tmp_path):
    """In every step and at every site: neither the reference's passes nor generation enter the factors."""
    agreement = Agreement()
    trainer = started(kind, way, tmp_path, tokenizer, callbacks=[agreement], gradient_accumulation_steps=2)
    trainer.train()
    assert engaged(of_trainer(trainer)) == (STEPS, 7)
    agreement.assert_whole(STEPS)


def test_several_updates_on_the_same_completions(tokenizer, tmp_path):
    """GRPO with μ = 2: every other step generates nothing, and the old policy takes one pass more."""
    agreement = Agreement()
    trainer = started("GRPO", "ready", tmp_path, tokenizer, callbacks=[agreement], num_iterations=2)
    trainer.train()
    assert engaged(of_trainer(trainer)) == (STEPS, 7)
    agreement.assert_whole(STEPS)


# On a ready PEFT model DPO and GRPO keep the adapter's start as a second one, "ref".
loads_both_adapters = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="transformers 4 loads the reference's adapter alone from a checkpoint with two",
)
RESUMED = [
    ("SFT", "ready"),
    *(pytest.param(kind, "ready", marks=loads_both_adapters) for kind in ("DPO", "GRPO")),
    *((kind, "peft_config") for kind in KINDS),
]


@pytest.mark.parametrize(("kind", "way"), RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(kind, way, tokenizer, tmp_path):
    """Bit for bit, GRPO too: it samples with torch's generator, whose state is in the checkpoint."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = started(kind, way, tmp_path / "whole", tokenizer, **saving)
    start = tiny.weights(whole.model)
    whole.train()
    started(kind, way, tmp_path / "part", tokenizer, callbacks=[Stop(2)], **saving).train()
    resumed = started(kind, way, tmp_path / "part", tokenizer, **saving)
    scrambled(resumed.model)
    resumed.train(resume_from_checkpoint=True)
    assert engaged(of_trainer(resumed)) == (STEPS, 7)
    assert_same(resumed.model, whole.model)
    assert all(not torch.equal(weight, start[name]) for name, weight in tiny.weights(whole.model).items())
