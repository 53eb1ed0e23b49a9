"""Trains the embedded base model from nothing on CPython's standard library."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..core import environment, memory
from ..core.files import BenchmarkError, write_json, write_with
from . import corpus
from . import load as base_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the result; `minutes` or `steps` ends the run, whichever is given."""

    minutes: float | None = None
    steps: int | None = None
    batch_size: int = 16
    context: int = 256
    muon_lr: float = 5e-3  # matrices; scaled so that an update's RMS is that of AdamW's
    adamw_lr: float = 5e-3  # embeddings and norms
    weight_decay: float = 0.05
    warmup: float = 0.02  # share of the run
    autocast: bool = False
    seed: int = 0
    threads: int = 2
    checkpoint_minutes: float = 4.0


@dataclass
class Data:
    """Packed token streams: `train` and `heldout` are int64 vectors."""

    tokenizer: Tokenizer
    train: torch.Tensor
    heldout: torch.Tensor
    record: dict[str, Any]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with the special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_model.VOCABULARY,
        special_tokens=list(base_model.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of tokens, each ended by <eos>."""
    end = tokenizer.token_to_id(base_model.EOS)
    ids = [token for item in tokenizer.encode_batch(texts) for token in (*item.ids, end)]
    return torch.tensor(ids, dtype=torch.int64)


def load_data() -> Data:
    """Reads the standard library, splits it by file, trains the tokenizer on the training files."""
    files = corpus.stdlib_sources()
    train = [file.text for file in files if not corpus.is_held_out(file)]
    heldout = [file.text for file in files if corpus.is_held_out(file)]
    tokenizer = train_tokenizer(train)
    data = Data(tokenizer, pack(tokenizer, train), pack(tokenizer, heldout), {})
    data.record = {
        "fingerprint": corpus.fingerprint(files),
        "train_files": len(train),
        "heldout_files": len(heldout),
        "characters": sum(len(file.text) for file in files),
        "train_tokens": data.train.numel(),
        "heldout_tokens": data.heldout.numel(),
    }
    return data


class Batches:
    """Contexts drawn without replacement; every epoch cuts the stream at another offset."""

    def __init__(self, stream: torch.Tensor, config: PretrainConfig) -> None:
        self.stream, self.config = stream, config

    def __call__(self, step: int) -> torch.Tensor:
        """The batch of one step, int64 [batch_size, context + 1]; seed and step alone decide it."""
        batch, width = self.config.batch_size, self.config.context + 1
        per_epoch = (self.stream.numel() - width) // width // batch
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
        offset = int(torch.randint(width, (1,), generator=generator))
        starts = torch.randperm(per_epoch * batch, generator=generator)[place * batch : (place + 1) * batch]
        index = offset + starts[:, None] * width + torch.arange(width)
        return self.stream[index]


def _loss(model: torch.nn.Module, tokens: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Mean negative log-likelihood in nats of every token after the first; tokens [n, context + 1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def heldout_loss(model: torch.nn.Module, stream: torch.Tensor, context: int, autocast: bool = False) -> float:
    """Mean loss in nats per token over consecutive contexts of a held-out stream."""
    width = context + 1
    rows = stream[: stream.numel() // width * width].view(-1, width)
    with torch.inference_mode():
        losses = [_loss(model, chunk, autocast) * len(chunk) for chunk in rows.split(32)]
    return float(sum(losses)) / len(rows)


class Pretraining:
    """Model, optimizers and place in the schedule: what a checkpoint holds."""

    def __init__(self, config: PretrainConfig) -> None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(config.seed)
        self.config = config
        self.model = LlamaForCausalLM(base_model.model_config())
        matrices = [p for n, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.dim() != 2 or "embed" in n]
        self.optimizers = [
            torch.optim.Muon(
                matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = (config.muon_lr, config.adamw_lr)
        self.step, self.seconds, self.curve = 0, 0.0, list[dict[str, float]]()

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: of the steps, or of the minutes."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        assert self.config.minutes is not None
        return min(1.0, self.seconds / (60 * self.config.minutes))

    def train_step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One step at the rate of the present progress; returns the loss before it."""
        progress = self.progress()
        scale = min(progress / self.config.warmup + 1e-2, 1.0) * (1.0 - progress)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        loss = _loss(self.model, tokens, self.config.autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": [self.step, self.seconds, self.curve],
        }
        write_with(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same configuration."""
        state = torch.load(path, weights_only=True)
        if state["config"] != asdict(self.config):
            raise BenchmarkError(
                f"{path} belongs to another configuration ({state['config']}); delete it or choose another "
                "--out"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curve = state["progress"]


def train(run: Pretraining, data: Data, checkpoint: Path) -> None:
    """The loop: steps, the loss curve, a checkpoint every few minutes."""
    batches, config, recent, saved = Batches(data.train, run.config), run.config, list[float](), run.seconds
    bar = tqdm(total=100.0, unit="%", bar_format="{percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}")
    while run.progress() < 1.0:
        begun = time.perf_counter()
        recent.append(float(run.train_step(batches(run.step))))
        run.step += 1
        run.seconds += time.perf_counter() - begun
        bar.set_postfix_str(f"step {run.step}, loss {recent[-1]:.3f}", refresh=False)
        bar.update(100 * run.progress() - bar.n)
        if run.step % 100 == 0 or run.progress() >= 1.0:
            held = heldout_loss(run.model, data.heldout, config.context, config.autocast)
            point = {
                "step": run.step,
                "seconds": run.seconds,
                "train": sum(recent) / len(recent),
                "heldout": held,
            }
            run.curve.append(point)
            recent.clear()
            tqdm.write(
                f"step {run.step}: train {point['train']:.4f}, held-out {held:.4f}, {run.seconds:.0f} s"
            )
        if run.seconds - saved > 60 * config.checkpoint_minutes:
            run.save(checkpoint)
            saved = run.seconds
    bar.close()


def _write_model(run: Pretraining, data: Data, out: Path) -> dict[str, Any]:
    """Write weights, configuration, tokenizer and the record of the training; returns the record."""
    heldout = heldout_loss(run.model, data.heldout, run.config.context)
    data.tokenizer.save(str(out / "tokenizer.json"))
    base_model.write_model(run.model, out)
    record = {
        "config": asdict(run.config),
        "corpus": data.record,
        "steps": run.step,
        "tokens_seen": run.step * run.config.batch_size * run.config.context,
        "heldout_loss_nats_per_token": heldout,
        "heldout_loss_of_bf16_file": heldout_loss(run.model.float(), data.heldout, run.config.context),
        "curve": run.curve,
        "seconds": run.seconds,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
    }
    write_json(out / "training_record.json", record)
    return record


def pretrain(config: PretrainConfig, out: Path) -> dict[str, Any]:
    """Train the base model into `out`, going on from a checkpoint of the same configuration there."""
    if (config.minutes is None) == (config.steps is None):
        raise BenchmarkError(
            "give exactly one of --minutes and --steps: it is what the learning rate decays over"
        )
    memory.keep_freed_memory()
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    data, run, checkpoint = load_data(), Pretraining(config), out / CHECKPOINT
    if checkpoint.is_file():
        run.load(checkpoint)
    train(run, data, checkpoint)
    record = _write_model(run, data, out)
    checkpoint.unlink(missing_ok=True)
    return record
