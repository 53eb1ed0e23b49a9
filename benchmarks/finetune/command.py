"""`python -m benchmarks train` from checked arguments to a folder: load, train, evaluate, save."""

from __future__ import annotations

import os
import pickle
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base_model.source import Source, load_processor, load_tokenizer, model_fingerprint, positions
from ..core import environment, memory
from ..core.files import BenchmarkError, write_json
from ..training.optimizers import check_base, check_optimizer, package_version, state_bytes
from ..training.train import plain
from . import card, hf, loop, output
from .config import MAX_LENGTH, FinetuneConfig, check, steps_of
from .data import FinetuneData, Origin, load
from .model import load_model
from .session import Record, Session, unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
_LIBRARIES = ("accelerate", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Order:
    """What is asked for beside the configuration; of it `epochs` and `max_length` alone decide the outcome.

    Attributes:
        epochs: passes over the training examples, in place of the configuration's steps.
        max_length: None: as long as the model reads, at most `default_length`.
    """

    source: Source
    origin: Origin
    out: Path
    epochs: float | None = None
    max_length: int | None = None
    save_every: int = 50
    resume: bool = False
    overwrite: bool = False
    threads: int | None = None
    default_length: int = MAX_LENGTH


def _length(order: Order) -> tuple[int, int | None]:
    """Most tokens of an example, and how many the model reads at all."""
    limit = positions(order.source)
    if order.max_length and limit and order.max_length > limit:
        raise BenchmarkError(
            f"--max-length {order.max_length}: {order.source.name} reads at most {limit} tokens"
        )
    return order.max_length or min(order.default_length, limit or order.default_length), limit


def finetune(config: FinetuneConfig, order: Order) -> Path:
    """Train, evaluate and save; returns the path of the metrics.

    Raises:
        BenchmarkError: A setting, model, data or folder that cannot be used, or a run that diverged.
    """
    check_base(check_optimizer(config.optimizer), config.base)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BenchmarkError("train runs in one process; start it without torchrun or accelerate launch")
    output.check(order.out, order.resume, order.overwrite)
    if order.threads:
        torch.set_num_threads(order.threads)
    if config.device == "cpu":
        memory.keep_freed_memory()
    if not order.epochs:
        check(config)
    tokenizer = load_tokenizer(order.source)
    length, limit = _length(order)
    config = replace(config, max_length=length)
    processor = load_processor(order.source)
    data = load(order.origin, tokenizer, config, processor)
    print(data.task.note)
    config = (
        replace(config, steps=steps_of(order.epochs, len(data.task.train), config))
        if order.epochs
        else config
    )
    check(config)
    next(data.task.batches(config.seed, config.batch_size))  # refuses a batch that is larger than the data
    code = environment.commit()  # as it is now, not when the run ends
    session, checkpoint, fingerprints = _start(config, order, (tokenizer, processor), data, limit)
    if output.is_finished(order.out):
        print(f"{order.out} holds this very run, finished; nothing is left to do")
        return order.out / output.METRICS
    _train(session, order, checkpoint)
    return _finish(session, order, processor or tokenizer, {"code": code, "fingerprints": fingerprints})


def _start(
    config: FinetuneConfig,
    order: Order,
    readers: tuple[PreTrainedTokenizerBase, Any],
    data: FinetuneData,
    limit: int | None,
) -> tuple[Session, Path | None, dict[str, str]]:
    """The session, the checkpoint that it goes on from, and what identifies data and model."""
    model = load_model(order.source, config)
    fingerprints = {"data": data.task.fingerprint, "model": model_fingerprint(order.source, model.config)}
    tokenizer, processor = readers
    session = Session(model, tokenizer, data, config, limit, processor)
    if order.overwrite and order.out.exists():
        output.clear(order.out)
    order.out.mkdir(parents=True, exist_ok=True)
    output.begin(order.out, config, fingerprints, order.resume)
    found = output.checkpoints(order.out)
    if order.resume:
        print(
            f"going on from {found[-1].name}"
            if found
            else "there is no checkpoint yet; starting at the beginning"
        )
    if found:
        session.record = Record.load(found[-1])
    return session, found[-1] if found else None, fingerprints


def _train(session: Session, order: Order, checkpoint: Path | None) -> None:
    """Run the trainer; a stop by the user says how to go on."""
    train = _trainer(session.config.trainer)
    environment.reset_peak_memory(session.config.device)
    try:
        session.begin()
        train(session, order.out, order.save_every, checkpoint)
    except (
        pickle.UnpicklingError
    ) as error:  # the loop and the Trainer both load what is safe and nothing else
        raise BenchmarkError(
            f"{unreadable(session.config.optimizer)}; start anew with --overwrite"
        ) from error
    except KeyboardInterrupt:
        found = output.checkpoints(order.out)
        kept = f"{found[-1].name} is kept" if found else "there was no checkpoint yet"
        raise KeyboardInterrupt(f"stopped at step {session.record.steps}; {kept}, --resume goes on") from None
    finally:
        session.end()


def _trainer(name: str) -> Callable[[Session, Path, int, Path | None], None]:
    """The trainer of that name; an error where its package is missing."""
    if name == "loop":
        return loop.train
    if environment.installed_version("accelerate") is None:
        raise BenchmarkError(
            "--trainer hf needs accelerate: pip install -e '.[finetune]'; or take --trainer loop"
        )
    return hf.train


def _finish(session: Session, order: Order, reader: PreTrainedTokenizerBase, known: dict[str, Any]) -> Path:
    """Write adapter, tokenizer or processor, card, and last the metrics; some are `known` already."""
    metrics = {**_metrics(session, order), **known}
    path = order.out / output.METRICS
    if session.record.diverged:
        write_json(path, metrics)
        raise BenchmarkError(
            f"the loss was no finite number any more at step {session.record.steps}: no adapter is saved; "
            f"lower --lr, raise --warmup, or lower --clip. What was measured until then: {path}"
        )
    _save_adapter(session, order.out)
    reader.save_pretrained(order.out)
    card.write(order.out, metrics, session.config)
    if hasattr(session.optimizer, "close"):
        session.optimizer.close()
    write_json(path, metrics)
    return path


def _save_adapter(session: Session, out: Path) -> None:
    """Write the adapter in PEFT's format; directions that GRIT gave up are left out."""
    ranks = getattr(session.optimizer, "ranks", None)
    if ranks is not None and any(site.rank < site.rank_before for site in ranks().sites):
        session.optimizer.save_adapter(out)  # type: ignore[attr-defined]
    else:
        session.model.save_pretrained(str(out))


def _metrics(session: Session, order: Order) -> dict[str, Any]:
    """Measurements, and what they depend on, as plain data without paths of this machine."""
    record, config, optimizer = session.record, session.config, session.optimizer
    ranks, telemetry = getattr(optimizer, "ranks", None), getattr(optimizer, "telemetry", None)
    task = session.data.task
    return {
        "format": FORMAT,
        "config": asdict(config),
        "data": {
            "argument": order.origin.argument,
            "hub": order.origin.hub,
            "note": task.note,
            "training": len(task.train),
            "heldout": len(task.heldout),
            "metric": task.metric,
        },
        "trainable_parameters": sum(p.numel() for p in session.model.parameters() if p.requires_grad),
        "curve": record.curve,
        "train_losses": record.losses,
        "diverged": record.diverged,
        "seconds": sum(record.step_seconds),
        "step_seconds": record.step_seconds,
        "step_seconds_median": statistics.median(record.step_seconds),
        "peak_memory_bytes": environment.peak_memory_bytes(config.device),
        "optimizer_state_bytes": state_bytes(optimizer.state_dict()),
        "ranks": dict(ranks()) if ranks else None,
        "telemetry": plain(telemetry(per_site=False)) if telemetry else None,
        "versions": environment.versions()
        | {name: environment.installed_version(name) for name in _LIBRARIES},
        "optimizer_package": package_version(config.optimizer) | package_version(config.base),
        "hardware": environment.hardware(config.device),
    }
