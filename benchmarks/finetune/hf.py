"""The run under transformers' Trainer, which is imported on demand: it takes seconds and needs accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..tasks.task import Example
from .batches import token_mean
from .output import KEPT
from .session import Session

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class _InOrder(Dataset[Example]):
    """All examples of the run one after another, so that both trainers meet the same batches."""

    def __init__(self, session: Session) -> None:
        self._examples = [example for batch in session.micro_batches() for example in batch]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, place: int) -> Example:
        return self._examples[place]


def _bridge(session: Session, save_every: int) -> TrainerCallback:
    """A callback that tells the session where the Trainer is."""
    from transformers import TrainerCallback
    from transformers.trainer import OPTIMIZER_NAME

    class Bridge(TrainerCallback):
        """Starts and stops the session's steps, and completes the Trainer's checkpoints."""

        def on_step_begin(
            self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            """Start the step's clock."""
            session.begin_step()

        def on_step_end(
            self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> TrainerControl:
            """Keep what the step gave, evaluate and save where it is due, stop a run that has diverged."""
            diverged = session.end_step()
            control.should_training_stop |= diverged
            control.should_save = not diverged and session.is_due(save_every)
            return control

        def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            """Complete the checkpoint with the record."""
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            session.record.save(folder)
            session.saved(folder / OPTIMIZER_NAME)

    return Bridge()


def _arguments(session: Session, folder: Path) -> TrainingArguments:
    from transformers import TrainingArguments

    config = session.config
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        train_sampling_strategy="sequential",  # the data come in the run's order
        max_grad_norm=config.clip,
        bf16=config.precision == "bf16",
        seed=config.seed,
        save_strategy="no",  # the session says when
        save_total_limit=KEPT,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the session has a bar of its own
        remove_unused_columns=False,
        use_cpu=config.device == "cpu",
        dataloader_pin_memory=config.device != "cpu",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # or the Trainer would spread a batch over all GPUs it sees
    return arguments


def _make(session: Session, folder: Path, save_every: int) -> Trainer:
    from transformers import PrinterCallback, Trainer

    def share_of_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """The micro-batch's share of the step's loss, which the session is told as well."""
        loss = token_mean(outputs, labels, num_items_in_batch)
        session.tell(loss)
        return loss

    trainer = Trainer(
        model=session.model,
        args=_arguments(session, folder),
        data_collator=session.collator,
        train_dataset=_InOrder(session),
        compute_loss_func=share_of_loss,
        optimizers=(session.optimizer, session.schedule),
        callbacks=[_bridge(session, save_every)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(session: Session, folder: Path, save_every: int, checkpoint: Path | None) -> None:
    """All steps from the checkpoint, or from the start, to the end of the run."""
    trainer = _make(session, folder, save_every)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
