"""transformers' Trainer over tiny models, as several test files run it."""

import tiny
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from grit_optim import GritOptimizer

HANDS_OVER_THE_MODEL = Version(transformers.__version__) >= Version("5.2")
"""Whether the Trainer hands a factory in ``optimizer_cls_and_kwargs`` the model, not parameter groups."""

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}
HALF = {"reprojection": "balanced", "reprojection_freq": 2, "rank_budget": 0.5, "min_lora_rank": 0}
"""GritOptimizer's options for a budget of half the parameters."""


def examples(count=32):
    return [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0, batch=count)]


def settings(folder, kind="", **arguments):
    usual = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    return getattr(transformers, f"{kind}TrainingArguments")(
        output_dir=str(folder), report_to="none", disable_tqdm=True, **{**usual, **arguments}
    )


def run(folder, model, optimizers=(None, None), kind="", callbacks=(), trainer=None, given=None, **arguments):
    """A Trainer that is ready to train.

    ``kind`` is "" or "Seq2Seq", ``trainer`` a subclass, ``given`` what it gets instead of ``optimizers``.
    """
    return (trainer or getattr(transformers, f"{kind}Trainer"))(
        model=model,
        args=settings(folder, kind, **arguments),
        train_dataset=examples(),
        eval_dataset=examples(4),
        callbacks=list(callbacks),
        **({"optimizers": optimizers} if given is None else given),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def loss_on_data(model):
    """Of all examples that the Trainer draws its batches from."""
    ids = tiny.tokens(0, batch=32).to(model.device)
    return model(input_ids=ids, labels=ids).loss.item()


def of_trainer(trainer):
    """The GritOptimizer inside what accelerate made of it."""
    assert isinstance(trainer.optimizer.optimizer, GritOptimizer)
    return trainer.optimizer.optimizer


def engaged(optimizer):
    told = optimizer.telemetry(per_site=False)
    return told["steps"], told["engaged_sites"]


def assert_same(one, other, matrices=14):
    ours, theirs = tiny.weights(one), tiny.weights(other)
    assert len(ours) == matrices
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close(one, other, **tolerance):
    ours, theirs = tiny.weights(one), tiny.weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


def scrambled(model):
    """The same base model with another adapter, as in a new process that is to load a checkpoint.

    The generator is left as it was: the Trainer seeded it, and draws the order of the data from it.
    """
    with torch.no_grad(), torch.random.fork_rng():
        for p in tiny.trained(model):
            p.normal_()
    return model


def restarted():
    return scrambled(tiny.llama(layers=1))


def built(model=None, **options):
    model = model or tiny.llama(layers=1)
    return model, tiny.grit(model, **options)


class Stop(transformers.TrainerCallback):
    """An interruption: the run was to go on, so its schedule is the whole run's."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Agreement(transformers.TrainerCallback):
    """Asks before every step whether taps and gradients agree; they do not after a pass too many or too few.

    Attributes:
        seen: the statuses of all sites, a list per step.
        ratios: gradients over taps of the first site, a number per step in which there was something to
            compare.
    """

    def __init__(self):
        self.seen = []
        self.ratios = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        reports = optimizer.optimizer.check_capture()
        self.seen.append([report.status for report in reports])
        if reports[0].tap_inner and reports[0].a_inner:
            self.ratios.append(reports[0].a_inner / reports[0].tap_inner)

    def assert_whole(self, steps):
        """All sites agree in every step but the first, in which B is zero and there is nothing to compare."""
        assert len(self.seen) == steps
        assert set(self.seen[0]) <= {"ok", "unknown"}
        assert {status for statuses in self.seen[1:] for status in statuses} == {"ok"}


QUANTIZED = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def qlora(folder, kind, rank=4, checkpointing=True):
    """The base model in ``folder`` in 4 or 8 bits, prepared by PEFT, with all linear layers adapted."""
    quantization = transformers.BitsAndBytesConfig(**QUANTIZED[kind])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    model = prepare_model_for_kbit_training(
        model,
        checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    return (
        model.train()
    )  # otherwise nothing is checkpointed, and bitsandbytes packs the weights as for inference
