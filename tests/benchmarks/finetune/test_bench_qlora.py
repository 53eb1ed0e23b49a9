"""QLoRA as one would train it: the embedded model in 4 and 8 bits, checkpointing, paged AdamW."""

import pytest
import tiny
import torch

from benchmarks.base_model.load import FOLDER
from benchmarks.tasks.objective import IGNORED
from grit_optim import GritOptimizer

bitsandbytes = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf import QUANTIZED, Agreement, Stop, assert_same, engaged, qlora  # noqa: E402

STEPS, BATCH = 6, 4
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:.*(GRIT|Grit).*")]


class Data(torch.utils.data.Dataset):
    """The task's examples as the Trainer wants them, the loss on the answers alone."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        example = self.examples[index]
        labels = [IGNORED] * len(example.prompt) + list(example.answer)
        return {"input_ids": [*example.prompt, *example.answer], "labels": labels}


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    )
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}


def built(kind):
    model = qlora(FOLDER, kind, rank=16)
    return model, GritOptimizer(bitsandbytes.optim.PagedAdamW8bit(tiny.trained(model), lr=5e-3), model)


def trainer_of(folder, model, optimizer, task, callbacks):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, bf16=True, use_cpu=True,
        report_to="none",
        disable_tqdm=True, logging_steps=1, save_strategy="steps", save_steps=STEPS // 2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, remove_unused_columns=False,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Data(task.train), data_collator=collate,
        optimizers=(optimizer, None), callbacks=callbacks,
    )  # fmt: skip


@torch.no_grad()
def heldout_loss(model, task):
    """In training mode: bitsandbytes packs weights for inference on some CPUs, but cannot at this width."""
    return model.train()(**collate([Data(task.heldout)[i] for i in range(16)])).loss.item()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_qlora_on_the_embedded_model(kind, naming_task, tmp_path):
    whole, optimizer = built(kind)
    agreement = Agreement()
    trainer = trainer_of(tmp_path / "whole", whole, optimizer, naming_task, [agreement])
    before = heldout_loss(whole, naming_task)
    trainer.train()
    after = heldout_loss(whole, naming_task)
    assert after < before - 1
    agreement.assert_whole(STEPS)
    assert engaged(optimizer) == (STEPS, 28)
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}
    first, interrupted = built(kind)
    trainer_of(tmp_path / "part", first, interrupted, naming_task, [Stop(STEPS // 2)]).train()
    second, fresh = built(kind)
    trainer_of(tmp_path / "part", second, fresh, naming_task, []).train(resume_from_checkpoint=True)
    assert engaged(fresh) == (STEPS, 28)
    assert_same(second, whole, matrices=56)
