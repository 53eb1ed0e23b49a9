"""Accelerate and Lightning: each trains with GritOptimizer as a hand-written loop does."""

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
