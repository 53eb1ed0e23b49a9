"""One run: LoRA on the base model, one optimizer, one learning rate, one seed."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..base_model.source import EMBEDDED, Source, load_config, load_weights, model_fingerprint
from ..base_model.vlm import embedded_model, embedded_weights
from ..core import environment, memory
from ..core.files import BenchmarkError, cache_folder, sha256, sha256_of_file
from ..core.results import RunConfig, finite, write_result
from ..core.settings import Settings
from ..tasks.answers import said, word_f1
from ..tasks.objective import answer_loss, collate, evaluate
from ..tasks.registry import PLAIN, Given
from ..tasks.task import Task
from .hidden import HiddenStates, Stem, folder_of
from .optimizers import make_optimizer, package_version, state_bytes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted_model(config: RunConfig, base: PreTrainedModel | None = None) -> PeftModel:
    """A model with LoRA on every linear layer; the initial adapter depends on rank, seed and model alone.

    `base` is the embedded model, or one whose frozen layers are taken out already.

    In "bf16" the frozen weights are kept in that precision; the adapter stays in fp32, as mixed-precision
    training has it.
    """
    from peft import LoraConfig, get_peft_model

    model = base or embedded_model(False)
    torch.manual_seed(config.seed)
    is_text = config.base == EMBEDDED and not hasattr(model.config, "vision_config")
    targets = list(LORA_TARGETS) if is_text else "all-linear"
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # between peft and transformers, nothing that is used here
        adapted = get_peft_model(model, lora)
    return in_precision(adapted, config).train()


def in_precision(model: Any, config: RunConfig) -> Any:
    """The adapted model on the run's device, its frozen weights as the run keeps them."""
    if config.precision == "bf16":
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    return model.to(config.device)


def autocast(config: RunConfig) -> torch.autocast:
    """The precision of a run's forward passes."""
    return torch.autocast(config.device.partition(":")[0], torch.bfloat16, enabled=config.precision == "bf16")


def learning_rate_scale(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: up over `warmup` steps, then down to 0 on a straight line."""
    return min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup), 1.0)


@cache
def weights_fingerprint(source: Source, reads_pictures: bool = False) -> str:
    """What identifies a base model's weights; read once, since a run needs it for data and hidden states."""
    if source.is_embedded:
        return sha256_of_file(embedded_weights(reads_pictures))
    return model_fingerprint(source, load_config(source))


def data_fingerprint(task: Task, source: Source = PLAIN.source) -> str:
    """sha256 of the task's data and the base model's weights: what makes two runs comparable."""
    return sha256([task.fingerprint, weights_fingerprint(source, task.has_pictures)])


def frozen_model(source: Source, reads_pictures: bool = False) -> PreTrainedModel:
    """The base model in fp32 and eval mode, without adapters."""
    if source.is_embedded:
        return embedded_model(reads_pictures)
    return load_weights(source, dtype=torch.float32).eval()


class Run:
    """Model, optimizer and what was measured so far."""

    def __init__(self, config: RunConfig, task: Task, given: Given = PLAIN) -> None:
        self.config, self.task = config, task
        if task.has_pictures and config.adapted_layers:
            raise BenchmarkError(
                f"--adapted-layers is for models that read text alone, and task {task.name} has pictures; "
                "leave the option out"
            )
        base = frozen_model(given.source, task.has_pictures)
        stem = Stem(base, config.adapted_layers) if config.adapted_layers else None
        self.model = adapted_model(config, base)
        self.hidden = self._hidden_states(stem, given) if stem and stem.count else None
        self.collate = self.hidden.collate if self.hidden else collate
        settings = Settings(config.lr, (config.beta1, config.beta2), config.weight_decay, config.options)
        self.optimizer = make_optimizer(config.optimizer, self.model, settings)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_scale(step, config.steps, config.warmup)
        )
        self.batches = task.batches(config.seed, config.batch_size)
        self.step_seconds: list[float] = []
        self.losses: list[float] = []
        self.padding: list[float] = []
        self.curve: list[dict[str, float | None]] = []
        self.exact_match: float | None = None
        self.answers: list[str] | None = None

    def _hidden_states(self, stem: Stem, given: Given) -> HiddenStates:
        in_precision(stem.layers, self.config)
        root, model = cache_folder(given.source.cache), weights_fingerprint(given.source)
        folder = folder_of(root, model, stem, self.config.precision)
        return HiddenStates(stem, folder, self.config.device, self._autocast)

    def prepare(self) -> None:
        """Compute what the frozen layers give for every example that the run will meet."""
        if self.hidden:
            batches = self.task.batches(self.config.seed, self.config.batch_size)
            met = itertools.chain.from_iterable(itertools.islice(batches, self.config.steps))
            self.hidden.prepare([*self.task.heldout, *met])

    def _autocast(self) -> torch.autocast:
        return autocast(self.config)

    def _synchronize(self) -> None:
        if self.config.device.startswith("cuda"):
            torch.cuda.synchronize()

    def train_step(self) -> float:
        """One full training step, timed; returns the loss before it."""
        batch = self.collate(next(self.batches)).to(self.config.device)
        self._synchronize()
        begun = time.perf_counter()
        with self._autocast():
            loss = answer_loss(self.model, batch)
        loss.backward()
        if hasattr(self.optimizer, "observe"):
            self.optimizer.observe(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self._synchronize()
        self.step_seconds.append(time.perf_counter() - begun)
        self.losses.append(float(loss.detach()))
        self.padding.append(batch.padding)
        return self.losses[-1]

    def measure(self) -> float | None:
        """Add a point of the held-out curve; None if the loss is no number any more."""
        with self._autocast():
            score = evaluate(self.model, self.task.heldout, device=self.config.device, collate=self.collate)
        loss = finite(score.loss)
        self.curve.append({"step": len(self.losses), "seconds": sum(self.step_seconds), "loss": loss})
        self.exact_match = score.exact_match
        return loss

    def answer(self) -> None:
        """Let the model name every held-out picture, in the order of the task."""
        if self.task.has_pictures:
            with self._autocast():
                self.answers = said(self.model, self.task.heldout, self.config.device)

    def result(self, diverged: bool) -> dict[str, Any]:
        """All measurements of the run as plain data."""
        telemetry = getattr(self.optimizer, "telemetry", None)
        return {
            "config": asdict(self.config),
            "curve": self.curve,
            "diverged": diverged,
            "final_loss": None if diverged else self.curve[-1]["loss"],
            "exact_match": None if diverged else self.exact_match,
            "metric": self.task.metric,
            "answers": self.answers,
            "word_f1": None if self.answers is None else word_f1(self.task.heldout, self.answers),
            "train_losses": [finite(loss) for loss in self.losses],
            "epochs": self.config.steps * self.config.batch_size / len(self.task.train),
            "seconds": sum(self.step_seconds),
            "step_seconds_median": statistics.median(self.step_seconds),
            "padding_share": statistics.fmean(self.padding),
            "peak_memory_bytes": environment.peak_memory_bytes(self.config.device),
            "optimizer_state_bytes": state_bytes(self.optimizer.state_dict()),
            "telemetry": plain(telemetry(per_site=False)) if telemetry else None,
            "task_fingerprint": self.task.fingerprint,
        }


def plain(value: Any) -> Any:
    """Nested data as JSON takes it: tensors as lists, non-finite numbers as null, the rest as text."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    return value if isinstance(value, str | int | None) else str(value)


def train(run: Run, advance: Callable[[float], None] = lambda loss: None) -> bool:
    """All steps with the held-out curve; returns whether the run diverged (and then stops at once).

    The curve starts before the first step and ends after the last; where it has no point between, it is the
    end alone.
    """
    diverged = run.config.eval_every < run.config.steps and run.measure() is None
    for step in range(1, run.config.steps + 1):
        if diverged:
            break
        loss = run.train_step()
        advance(loss)
        last = step == run.config.steps
        diverged = finite(loss) is None
        if not diverged and (last or step % run.config.eval_every == 0):
            diverged = run.measure() is None
    return diverged


def execute(
    config: RunConfig,
    folder: Path,
    threads: int,
    jobs: int = 1,
    slot: int = 0,
    given: Given = PLAIN,
) -> Path:
    """Carry out one run in this process, with a progress bar, and write its result."""
    begun = time.perf_counter()
    memory.keep_freed_memory()
    torch.set_num_threads(threads)
    task = given.task(config.task)
    # As they are now, not when the run ends.
    code, fingerprint = environment.commit(), data_fingerprint(task, given.source)
    environment.reset_peak_memory(config.device)
    run = Run(config, task, given)
    run.prepare()
    name = f"{config.optimizer} lr {config.lr:g} seed {config.seed}"
    with tqdm(total=config.steps, desc=name, unit="step", position=slot, leave=jobs == 1) as bar:

        def advance(loss: float) -> None:
            """Move the progress bar by one step."""
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        diverged = train(run, advance)
    if not diverged:
        run.answer()
    result = {
        **run.result(diverged),
        "wall_seconds": time.perf_counter()
        - begun,  # with loading and evaluation: what planning a suite goes by
        "fingerprint": fingerprint,
        "versions": environment.versions(),
        "optimizer_package": package_version(config.optimizer),
        "code": code,
        "hardware": {**environment.hardware(config.device), "jobs": jobs},
    }
    if hasattr(run.optimizer, "close"):
        run.optimizer.close()
    return write_result(folder, result)
