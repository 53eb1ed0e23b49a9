"""The hand-written training loop, with checkpoints that continue exactly."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..core.files import BenchmarkError
from ..core.settings import trainable
from .batches import Inputs, answer_tokens, token_mean
from .output import KEPT, checkpoints
from .session import Session

_STATE = "state.pt"


def train(session: Session, folder: Path, save_every: int, checkpoint: Path | None) -> None:
    """All steps from the checkpoint, or from the start, to the end of the run."""
    if checkpoint is not None:
        _load(session, checkpoint)
    config = session.config
    batches = itertools.islice(session.micro_batches(), session.record.steps * config.accumulation, None)
    while session.record.steps < config.steps:
        micro = [session.collator(next(batches)) for _ in range(config.accumulation)]
        total = answer_tokens(micro).to(config.device)
        session.begin_step()
        _step(session, micro, total)
        if session.end_step():
            return
        if session.is_due(save_every):
            _save(session, folder)


def _step(session: Session, micro: list[Inputs], total: torch.Tensor) -> None:
    """One update from several micro-batches."""
    session.model.train()
    for batch in micro:
        inputs = {name: value.to(session.config.device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        with session.evaluator.autocast():
            outputs = session.model(**inputs)
        loss = token_mean(outputs, labels, total)
        loss.backward()
        session.tell(loss)
    if session.config.clip:
        torch.nn.utils.clip_grad_norm_(trainable(session.model), session.config.clip)
    session.optimizer.step()
    session.schedule.step()
    session.optimizer.zero_grad()


def _save(session: Session, folder: Path) -> None:
    """Write a checkpoint whole or not at all, then remove all but the last two."""
    place = folder / f"checkpoint-{session.record.steps}"
    unfinished = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    adapter = {name: p.detach() for name, p in session.model.named_parameters() if p.requires_grad}
    state = {
        "adapter": adapter,
        "optimizer": session.optimizer.state_dict(),
        "schedule": session.schedule.state_dict(),
    }
    torch.save(state, unfinished / _STATE)
    session.record.save(unfinished)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(unfinished, place)
    session.saved(place / _STATE)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def _load(session: Session, checkpoint: Path) -> None:
    state = _read(checkpoint / _STATE, session)
    weights = {name: p for name, p in session.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["adapter"][name])
    session.optimizer.load_state_dict(state["optimizer"])
    session.schedule.load_state_dict(state["schedule"])


def _read(path: Path, session: Session) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=session.config.device, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise BenchmarkError(
            f"cannot read {path} ({error}); delete its folder and --resume from the one before"
        ) from error
