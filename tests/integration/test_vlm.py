"""Vision-language models of transformers: every pair is seen, runs resume exactly, trainers take pictures."""

import warnings
from copy import deepcopy

import pytest
import tiny
import torch
import vlm

from grit_optim import GritOptimizer, for_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf import QUANTIZED, Agreement, Stop, assert_same, of_trainer, scrambled, settings  # noqa: E402
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:.*(GRIT|Grit).*"),
]
# What no gradient reaches: pooling heads that no projector reads, and the audio part without any sound.
UNUSED = {"paligemma": 3, "gemma3": 3, "phi4-multimodal": 16}


def grit(model, **options):
    return GritOptimizer(tiny.adamw(model, 1e-3), model, **{"kfac_min_samples": 2, **options})


def train(model, optimizer, name, steps, first=0):
    """Two micro-batches a step: one of several pictures, one with a picture in a row alone."""
    for seed in range(first, first + steps):
        for micro, pictures in enumerate(((1, 2), (1, 0))):
            (model(**vlm.batch(name, 10 * seed + micro, pictures)).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", vlm.MODELS)
def test_taps_see_what_gradients_see_at_every_pair_of_every_part(name):
    model = vlm.adapted(name)
    optimizer = grit(model)
    for seed in range(2):
        for pictures in ((1, 2), (2, 1)):
            model(**vlm.batch(name, seed, pictures)).loss.backward()
        statuses = [report.status for report in optimizer.check_capture()]
        assert statuses.count("unused") == UNUSED.get(name, 0)
        assert set(statuses) <= {"ok", "unused"}
        optimizer.step()
        optimizer.zero_grad()
    told = optimizer.telemetry(per_site=False)
    assert told["engaged_sites"] == told["sites"] - UNUSED.get(name, 0)
    assert told["sites_by_gradients"] == 0


CHECKPOINTED = [
    ("llava", False),
    ("llava", True),
    ("mllama", True),
    ("qwen3-vl", False),  # with the reentrant kind transformers itself loses gradients of its deepstack
]


@pytest.mark.parametrize(("name", "reentrant"), CHECKPOINTED)
def test_checkpointed_activations_change_nothing(name, reentrant):
    model, other = vlm.adapted(name), vlm.adapted(name)
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.train()
    for one in (model, other):
        train(one, grit(one), name, 2)
    for key, weight in tiny.weights(model).items():
        torch.testing.assert_close(tiny.weights(other)[key], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", vlm.MODELS)
def test_a_resumed_run_equals_the_uninterrupted_one(name):
    model = vlm.adapted(name)
    optimizer = grit(model)
    train(model, optimizer, name, 2)
    state, weights = deepcopy(optimizer.state_dict()), tiny.weights(model)
    train(model, optimizer, name, 2, first=2)
    other = vlm.adapted(name, seed=0)
    other.load_state_dict(weights, strict=False)
    resumed = grit(other)
    resumed.load_state_dict(state)
    train(other, resumed, name, 2, first=2)
    assert_same(other, model, matrices=len(weights))


def test_a_batch_without_pictures_leaves_the_vision_part_as_it_was():
    model = vlm.adapted()
    optimizer = grit(model)
    train(model, optimizer, "llava", 1)
    before = {name: site["samples"] for name, site in optimizer.telemetry()["per_site"].items()}
    model(**vlm.batch(pictures=(0, 0))).loss.backward()
    optimizer.step()
    after = {name: site["samples"] for name, site in optimizer.telemetry()["per_site"].items()}
    grown = {name for name in after if after[name] > before[name]}
    assert grown == {name for name in before if "language_model" in name}


# -------------------------------------------------------------------- trainers


class Pictures(torch.utils.data.Dataset):
    """Rows of a picture and text."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {key: value[0] for key, value in vlm.batch(seed=i, pictures=(1,)).items()}


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def of_transformers(folder, optimizer, model, **arguments):
    arguments = settings(
        folder,
        **{"max_steps": 4, "gradient_accumulation_steps": 2, "remove_unused_columns": False, **arguments},
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Pictures(),
        data_collator=collate,
        optimizers=(optimizer, None),
    )


def test_transformers_trainer_sees_every_part_and_resumes_exactly(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, agreement = vlm.adapted(), Agreement()
    trainer = of_transformers(tmp_path / "whole", grit(whole), whole, **saving)
    trainer.add_callback(agreement)
    trainer.train()
    agreement.assert_whole(4)
    first = vlm.adapted()
    trainer = of_transformers(tmp_path / "part", grit(first), first, **saving)
    trainer.add_callback(Stop(2))
    trainer.train()
    second = scrambled(vlm.adapted())
    trainer = of_transformers(tmp_path / "part", grit(second), second, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert_same(second, whole, matrices=56)
    assert of_trainer(trainer).telemetry(per_site=False)["engaged_sites"] == 28


@pytest.mark.parametrize("way", ["ready", "factory"])
def test_trls_sft_with_images(way, tmp_path):
    """The trainer reads pictures itself; each part may have its own rate."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from PIL import Image

    rows = [
        {
            "images": [Image.new("RGB", (8, 8), (16 * i, 7 * i, 200))],
            "prompt": [{"role": "user", "content": "w1 w2"}],
            "completion": [{"role": "assistant", "content": f"w{i} w3"}],
        }
        for i in range(8)
    ]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
    )
    model, agreement = vlm.adapted(), Agreement()
    given = {"optimizers": (grit(model), None)}
    if way == "factory":
        model = model.unload()
        given = {"peft_config": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")}
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=vlm.processor(),
        callbacks=[agreement],
        **given,
    )
    if way == "factory":
        trainer.optimizer = for_trainer(trainer.model, lr=1e-2, vision={"lr": 1e-3}, kfac_min_samples=2)
    trainer.train()
    agreement.assert_whole(3)
    parts = of_trainer(trainer).telemetry(per_site=False)["modalities"]
    assert {part: told["engaged_sites"] for part, told in parts.items()} == {
        "vision": 12,
        "cross_modal": 2,
        "text": 14,
    }


def test_nf4(tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 64}
    config = {
        key: {**vlm.MODELS["llava"][1][key], **wide, **({"head_dim": 32} if key == "text_config" else {})}
        for key in ("vision_config", "text_config")
    }
    vlm.plain("llava", **config).save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(**QUANTIZED["nf4"])
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    model = prepare_model_for_kbit_training(model, True, {"use_reentrant": False})
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")).train()
    optimizer = grit(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(GRIT|Grit).*")
        for seed in range(3):
            model(**vlm.batch(seed=seed)).loss.backward()
            assert {report.status for report in optimizer.check_capture()} <= {"ok", "unknown"}
            optimizer.step()
            optimizer.zero_grad()
    parts = optimizer.telemetry(per_site=False)["modalities"]
    assert {part: told["engaged_sites"] for part, told in parts.items()} == {
        "vision": 12,
        "cross_modal": 2,
        "text": 14,
    }
