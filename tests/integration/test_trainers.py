"""Accelerate and Lightning train with GritOptimizer as a hand-written loop does, and resume exactly."""

import pytest
import tiny
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf import assert_close, assert_same, built, engaged, restarted

STEPS = 4
CLIP = 1e-3
"""Below every gradient norm of these runs."""

pytestmark = pytest.mark.filterwarnings("error:.*(GRIT|Grit).*")


def by_hand(clip=None):
    model, optimizer = built()
    for seed in range(STEPS):
        optimizer.zero_grad()
        tiny.loss_of(model, seed).backward()
        if clip:
            assert torch.nn.utils.clip_grad_norm_(tiny.trained(model), clip) > clip
        optimizer.step()
    return model


# -------------------------------------------------------------------- accelerate


class Accelerated:
    """An Accelerate loop that can stop and go on."""

    def __init__(self, model, optimizer, accumulate=1):
        import accelerate

        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision="no", gradient_accumulation_steps=accumulate
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.accumulate = accumulate

    def train(self, seeds, clip=None):
        for seed in (seed for seed in seeds for _ in range(self.accumulate)):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(tiny.loss_of(self.model, seed))
                if clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("clip", [None, CLIP], ids=["", "clipped"])
def test_accelerate_is_the_hand_written_loop(clip):
    model, optimizer = built()
    Accelerated(model, optimizer).train(range(STEPS), clip)
    assert_same(model, by_hand(clip))
    assert engaged(optimizer) == (STEPS, 7)


def test_accelerate_with_accumulation_steps_as_often_as_it_says():
    """Every batch comes twice with half its weight: up to rounding, the loop without accumulation."""
    model, optimizer = built()
    Accelerated(model, optimizer, accumulate=2).train(range(STEPS))
    assert engaged(optimizer) == (STEPS, 7)
    assert_close(model, by_hand(), rtol=1e-4, atol=1e-5)


def test_accelerate_goes_on_from_a_saved_state(tmp_path):
    loop = Accelerated(*built())
    loop.train(range(2))
    loop.accelerator.save_state(tmp_path)
    model = restarted()
    second = Accelerated(model, optimizer := tiny.grit(model))
    second.accelerator.load_state(tmp_path)
    second.train(range(2, STEPS))
    assert engaged(optimizer) == (STEPS, 7)
    assert_same(model, by_hand())


# -------------------------------------------------------------------- Lightning


def lightning_module(model=None, automatic=True):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.model = model or tiny.llama(layers=1)

        def configure_optimizers(self):
            self.grit = tiny.grit(self.model)
            return self.grit

        def training_step(self, batch, index):
            # Two epochs of half as many batches each, which go on where the first ended.
            seed = int(batch) + self.current_epoch * STEPS // 2
            loss = tiny.loss_of(self.model, seed)
            if not automatic:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    return Module()


def fit(folder, module, epochs=2, clip=None, **resuming):
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=clip,
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS // 2)), **resuming)
    return trainer


WAYS = {"closure": (True, None), "closure, clipped": (True, CLIP), "manual": (False, None)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("automatic", "clip"), WAYS.values(), ids=WAYS.keys())
def test_lightning_is_the_hand_written_loop(tmp_path, automatic, clip):
    module = lightning_module(automatic=automatic)
    fit(tmp_path, module, clip=clip)
    assert engaged(module.grit) == (STEPS, 7)
    assert_same(module.model, by_hand(clip))


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_from_a_checkpoint(tmp_path):
    fit(tmp_path, lightning_module(), epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    module = lightning_module(restarted())
    fit(tmp_path, module, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert engaged(module.grit) == (STEPS, 7)
    assert_same(module.model, by_hand())
