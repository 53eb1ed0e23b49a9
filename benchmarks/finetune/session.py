"""What both trainers share: model, optimizer, schedule, batches, and the record of what was measured."""

from __future__ import annotations

import itertools
import json
import pickle
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..core.files import BenchmarkError, write_json
from ..core.results import finite
from ..core.settings import Settings
from ..tasks.task import Example
from ..training.optimizers import make_optimizer
from .batches import collator
from .config import SCHEDULES, FinetuneConfig
from .data import FinetuneData
from .evaluate import Evaluator
from .output import RECORD
from .pictures import PictureCollator

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass
class Record:
    """Losses, times and evaluations so far; every checkpoint holds them.

    Attributes:
        losses: of every step, before its update, in nats per answer token; None: no finite number.
        step_seconds: of every step, without data and evaluation.
        curve: points of the held-out evaluation.
    """

    losses: list[float | None] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Number of steps that are done."""
        return len(self.losses)

    @property
    def diverged(self) -> bool:
        """Whether a loss was no finite number; nothing is trained after that."""
        return None in self.losses[-1:] or any(point["loss"] is None for point in self.curve)

    def save(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder."""
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read the record from a checkpoint's folder."""
        return cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))


def _optimizer(model: PeftModel, config: FinetuneConfig) -> torch.optim.Optimizer:
    settings = Settings(
        config.lr, (config.beta1, config.beta2), config.weight_decay, config.options, config.base
    )
    try:
        return make_optimizer(config.optimizer, model, settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BenchmarkError(f"--optimizer {config.optimizer} cannot be built: {error}") from error


class Session:
    """One run. Its trainer calls `begin_step`, `tell` for each micro-batch, then `end_step`."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        data: FinetuneData,
        config: FinetuneConfig,
        limit: int | None = None,
        processor: Any = None,
    ) -> None:
        from transformers import get_scheduler

        self.model, self.data, self.config = model, data, config
        self.optimizer = _optimizer(model, config)
        self.schedule = get_scheduler(
            SCHEDULES[config.schedule],
            self.optimizer,
            num_warmup_steps=config.warmup,
            num_training_steps=config.steps,
        )
        pad: Any = tokenizer.pad_token_id
        self.collator = collator(model, pad)
        if processor is not None:
            self.collator = PictureCollator(pad, self.collator.narrow, processor)
        self.evaluator = Evaluator(model, tokenizer, data, config, self.collator, limit)
        self.record = Record()
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._parts: list[Tensor] = []
        self._begun = 0.0
        self._told_of_state = False

    def micro_batches(self) -> Iterator[list[Example]]:
        """All batches of the run in their order, which depends on data, seed and batch size alone."""
        count = self.config.steps * self.config.accumulation
        return itertools.islice(self.data.task.batches(self.config.seed, self.config.batch_size), count)

    def begin(self) -> None:
        """Measure where the model starts, unless a checkpoint knows it, and show the progress bar."""
        if not self.record.curve:
            self._measure(generate=True)
        self._bar = tqdm(
            total=self.config.steps,
            initial=self.record.steps,
            desc=f"training ({self.config.optimizer})",
            unit="step",
        )

    def end(self) -> None:
        """Take the progress bar away."""
        self._bar.close()

    def begin_step(self) -> None:
        """Start the clock. Seed and step alone decide what the step draws, in a resumed run too."""
        torch.manual_seed((self.config.seed * 1_000_003 + self.record.steps) % 2**63)
        self._parts = []
        self._synchronize()
        self._begun = time.perf_counter()

    def tell(self, loss: Tensor) -> None:
        """Take a micro-batch's share of the step's loss, for the record and for the optimizer."""
        self._parts.append(loss.detach())
        if hasattr(self.optimizer, "observe"):  # it averages what it is told, and these are shares of a mean
            self.optimizer.observe(loss.detach() * self.config.accumulation)

    def end_step(self) -> bool:
        """Stop the clock, keep the loss, evaluate where it is due; returns whether the run has diverged."""
        loss = float(torch.stack(self._parts).sum())
        self._synchronize()
        self.record.step_seconds.append(time.perf_counter() - self._begun)
        self.record.losses.append(finite(loss))
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update()
        step, last = self.record.steps, self.record.steps == self.config.steps
        if not self.record.diverged and (
            last or (self.config.eval_every and step % self.config.eval_every == 0)
        ):
            self._measure(generate=last)
        return self.record.diverged

    def is_due(self, every: int) -> bool:
        """Whether a checkpoint is due after the step; it always is after the last one."""
        return self.record.steps == self.config.steps or bool(every and self.record.steps % every == 0)

    def saved(self, state: Path) -> None:
        """Say once, at the first checkpoint, if its optimizer state will not load; not only at the resume."""
        if not self._told_of_state:
            self._told_of_state = True
            try:
                torch.load(state, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                self._bar.write(f"note: {unreadable(self.config.optimizer)}")

    def _measure(self, generate: bool) -> None:
        point = self.evaluator.measure(generate)
        seconds = sum(self.record.step_seconds)
        self.record.curve.append({"step": self.record.steps, "seconds": seconds, **point})
        self._bar.write(f"step {self.record.steps}: held-out " + ", ".join(_told(point)))

    def _synchronize(self) -> None:
        if self.config.device.startswith("cuda"):
            torch.cuda.synchronize()


def unreadable(optimizer: str) -> str:
    """Why runs of some optimizers cannot be resumed."""
    return (
        f"optimizer {optimizer!r} keeps objects in its state that torch does not load safely, so its runs "
        "cannot be resumed"
    )


def _told(point: dict[str, Any]) -> list[str]:
    """The values of a point in words."""
    return [
        f"{name.replace('_', ' ')} {value:.4g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in point.items()
    ]
