"""fp16 with a GradScaler in the trainers: an overflow skips the step, and discards what the taps saw of it.

transformers and accelerate give no scaler to a run on the CPU, so there it is put in the place where
accelerate keeps it; everything from there on is what they run on a GPU.
"""

import pytest
import tiny
import torch

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from hf import Agreement, Stop, assert_same, built, engaged, losses, restarted, run  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
OVERFLOWS = {"init_scale": 2.0**40, "backoff_factor": 2.0**-15, "growth_interval": 1000}
"""Half precision ends at 65,504 and δ is about 1e-3: the first scales overflow, the later ones do not."""
EXACT = {"init_scale": 2.0**10, "growth_interval": 1000}

pytestmark = pytest.mark.filterwarnings("error:.*(GRIT|Grit).*")


def with_scaler(accelerator, device, scaler):
    """The accelerator as it is on a GPU: fp16 autocast and a scaler of our own choice."""
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler(device, **scaler)
    assert accelerator.mixed_precision == "fp16"
    return accelerator.scaler


class Skipped(Agreement):
    """Also counts the steps that did not happen."""

    def __init__(self):
        super().__init__()
        self.skipped = 0

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.skipped += optimizer.step_was_skipped


def trainer_of(folder, device, model, optimizer, scaler, **more):
    trainer = run(folder, model, (optimizer, None), fp16=True, use_cpu=device == "cpu", max_steps=8, **more)
    return trainer, with_scaler(trainer.accelerator, device, scaler)


@pytest.mark.parametrize("device", DEVICES)
def test_the_trainer_skips_overflows_and_discards_their_statistics(tmp_path, device):
    model, optimizer = built()
    watch = Skipped()
    trainer, scaler = trainer_of(tmp_path, device, model, optimizer, OVERFLOWS, callbacks=[watch])
    trainer.train()
    assert watch.skipped > 0
    assert scaler.get_scale() == 2.0 ** (40 - 15 * watch.skipped)
    steps, sites = engaged(optimizer)
    assert (steps, sites) == (8 - watch.skipped, 7)
    told = optimizer.telemetry(per_site=False)
    # The Trainer clears by model.zero_grad(): what the skipped batches gave went with their gradients.
    assert told["dropped_folds"] == 0
    assert all(0 < count < 8 * 44 for count in told["samples"].values())
    assert all(weight.isfinite().all() for weight in tiny.weights(model).values())
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert {status for statuses in watch.seen[watch.skipped + 1 :] for status in statuses} == {"ok"}


def distance(one, other):
    return torch.stack([(one[name].cpu() - other[name].cpu()).norm() for name in one]).norm().item()


@pytest.mark.parametrize("device", DEVICES)
def test_a_scaled_run_learns_what_an_fp32_run_learns_and_resumes_exactly(tmp_path, device):
    """fp16 and its scale change little beside what is learnt, and resuming changes no bit."""
    plain, optimizer = built()
    start = tiny.weights(plain)
    run(tmp_path / "plain", plain, (optimizer, None), use_cpu=device == "cpu", max_steps=8).train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, scaled = built()
    trainer_of(tmp_path / "whole", device, whole, scaled, EXACT, **saving)[0].train()
    assert engaged(scaled) == (8, 7)
    assert distance(tiny.weights(whole), tiny.weights(plain)) < 0.1 * distance(tiny.weights(plain), start)
    first, interrupted = built()
    trainer_of(tmp_path / "part", device, first, interrupted, EXACT, callbacks=[Stop(3)], **saving)[0].train()
    second, fresh = built(restarted())
    trainer, scaler = trainer_of(tmp_path / "part", device, second, fresh, {"init_scale": 1.0}, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert scaler.get_scale() == 2.0**10, "the checkpoint's scale"
    assert engaged(fresh) == (8, 7)
    assert_same(second, whole)


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["", "clipped"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_accelerate_loop_skips_overflows(device, clip):
    model, optimizer = built()
    accelerator = accelerate.Accelerator(cpu=device == "cpu", mixed_precision="fp16")
    scaler = with_scaler(accelerator, device, OVERFLOWS)
    prepared, stepped = accelerator.prepare(model, optimizer)
    skipped, seen = 0, []
    for seed in range(8):
        ids = tiny.tokens(seed).to(accelerator.device)
        accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
        if clip:
            accelerator.clip_grad_norm_(prepared.parameters(), clip)
        seen.append({report.status for report in optimizer.check_capture()})
        stepped.step()
        stepped.zero_grad()
        skipped += stepped.step_was_skipped
    assert skipped > 0
    assert scaler.get_scale() == 2.0 ** (40 - 15 * skipped)
    assert engaged(optimizer) == (8 - skipped, 7)
    # Here zero_grad() is the optimizer's, which discards what the taps gathered: no fold has to be dropped.
    assert optimizer.telemetry(per_site=False)["dropped_folds"] == 0
    assert all(statuses == {"ok"} for statuses in seen[skipped + 1 :])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_lightning_skips_overflows(tmp_path, device):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.grit = built()

        def configure_optimizers(self):
            self.grit = tiny.grit(self.model)
            return self.grit

        def training_step(self, batch, index):
            ids = tiny.tokens(int(batch)).to(self.device)
            return self.model(input_ids=ids, labels=ids).loss

    module = Module()
    scaler = torch.amp.GradScaler(device, **OVERFLOWS)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator={"cpu": "cpu", "cuda": "gpu"}[device],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        plugins=[MixedPrecision("16-mixed", device, scaler)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(8)))
    steps, sites = engaged(module.grit)
    assert 0 < steps < 8
    assert scaler.get_scale() == 2.0 ** (40 - 15 * (8 - steps))
    assert sites == 7
    assert all(weight.isfinite().all() for weight in tiny.weights(module.model).values())
