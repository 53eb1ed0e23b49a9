"""Trains the embedded vision-language model: encoder and projector from nothing, the Llama from its file.

It learns to name Material Design icons. First encoder and projector learn alone which words a name has: a
step of that costs a third, and without it the decoder learns for long what names are like before it looks at
the pictures. Then all parts learn the names.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..core import environment, memory
from ..core.files import sha256, write_json
from . import vlm
from .icons import MATERIAL, PACKAGES, PIXELS, POINTS, icons, render
from .load import EOS, load_tokenizer, write_model
from .muon import Muon

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

SIZES = (22, 24, 26, POINTS)  # the font's, of which training draws one
SHIFT = 2  # pixels at most, in each direction
IGNORED = -100
_GROUP = 16  # batches whose names are sorted by length together, so that little is padding
_POINT = 75  # steps between two points of the curve


@dataclass(frozen=True)
class VlmPretrainConfig:
    """Everything that decides the result."""

    steps: int = 200
    encoder_steps: int = 1000  # before, of encoder and projector alone
    batch_size: int = 96
    encoder_batch_size: int = 128
    muon_lr: float = 3e-3  # matrices
    encoder_muon_lr: float = 5e-3
    adamw_lr: float = 3e-3  # embeddings, norms, biases
    weight_decay: float = 0.05
    warmup: float = 0.04  # share of each part
    seed: int = 0
    threads: int = 1


@dataclass
class Pictures:
    """Icons by place: token ids of their names, and pixels, uint8 [sizes, icons, PIXELS, PIXELS]."""

    names: list[list[int]]
    pixels: torch.Tensor

    def text(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [icons, prompt and name] and labels [icons, name] of a batch, int64, padded on the right."""
        names = [self.names[place] for place in places]
        longest, asked = max(map(len, names)), len(vlm.PROMPT)
        tokens = torch.zeros(len(names), asked + longest - 1, dtype=torch.long)
        tokens[:, :asked] = torch.tensor(vlm.PROMPT)
        labels = torch.full((len(names), longest), IGNORED)
        for row, name in enumerate(names):
            tokens[row, asked : asked + len(name) - 1] = torch.tensor(name[:-1])
            labels[row, : len(name)] = torch.tensor(name)
        return tokens, labels

    def drawn(self, places: Sequence[int], draw: torch.Generator | None) -> torch.Tensor:
        """Pixel values of a batch in sizes and places that are drawn, or for None as tasks have them."""
        index = torch.tensor(places)
        if draw is None:
            return vlm.pixel_values(self.pixels[-1, index])
        size = torch.randint(len(self.pixels), index.shape, generator=draw)
        shifts = torch.randint(-SHIFT, SHIFT + 1, (2, len(index), 1), generator=draw)
        rows, columns = (torch.arange(PIXELS) + shifts) % PIXELS  # around the edge there is paper
        picture = torch.arange(len(index))[:, None, None]
        return vlm.pixel_values(self.pixels[size, index][picture, rows[:, :, None], columns[:, None, :]])


@dataclass
class Data:
    """What is learnt: the icons, which of them are for training, and which for the curve alone."""

    pictures: Pictures
    words: list[frozenset[str]]
    train: list[int]
    heldout: list[int]
    record: dict[str, Any]


def load_data() -> Data:
    """Material Design icons, rendered in every size; takes some ten seconds."""
    some = icons(MATERIAL)
    encoded = load_tokenizer().encode_batch([f" {icon.name}{EOS}" for icon in some])
    rendered = [b"".join(render(MATERIAL, some, points)) for points in SIZES]
    pixels = torch.frombuffer(bytearray(b"".join(rendered)), dtype=torch.uint8)
    places = range(len(some))
    train, heldout = ([p for p in places if some[p].is_held_out == held] for held in (False, True))
    record = {
        "icons": MATERIAL.name,
        "fingerprint": sha256([*(icon.name for icon in some), *(one.hex() for one in rendered)]),
        "train_icons": len(train),
        "heldout_icons": len(heldout),
    }
    names = [encoding.ids for encoding in encoded]
    pictures = Pictures(names, pixels.view(len(SIZES), len(some), PIXELS, PIXELS))
    return Data(pictures, [frozenset(icon.name.split()) for icon in some], train, heldout, record)


def batches(data: Data, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of training icons; each epoch is a permutation, in batches of names of like length."""
    generator, names = random.Random(seed), data.pictures.names
    while True:
        order = generator.sample(data.train, len(data.train) // size * size)
        for start in range(0, len(order), size * _GROUP):
            group = sorted(order[start : start + size * _GROUP], key=lambda place: len(names[place]))
            some = [group[place : place + size] for place in range(0, len(group), size)]
            generator.shuffle(some)
            yield from some


def name_loss(
    model: LlavaForConditionalGeneration, tokens: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean nats per token of the names, and which names are right as a whole, bool [icons]."""
    given = {"input_ids": tokens, "pixel_values": pixels, "logits_to_keep": labels.shape[1]}
    logits = model(**given, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return loss, ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)


@torch.inference_mode()
def measure(model: LlavaForConditionalGeneration, data: Data, blank: bool = False) -> dict[str, float]:
    """Held-out `loss` in nats per token and `exact_match`; with `blank` every picture is white paper."""
    total, right, count = 0.0, 0, 0
    ordered = sorted(data.heldout, key=lambda place: len(data.pictures.names[place]))
    for start in range(0, len(ordered), 96):
        places = ordered[start : start + 96]
        tokens, labels = data.pictures.text(places)
        pixels = data.pictures.drawn(places, None)
        loss, exact = name_loss(model, tokens, labels, torch.ones_like(pixels) if blank else pixels)
        wanted = int((labels != IGNORED).sum())
        total, right, count = total + float(loss) * wanted, right + int(exact.sum()), count + wanted
    return {"loss": total / count, "exact_match": right / len(ordered)}


class WordHead(torch.nn.Module):
    """Which words a name has, from the mean of a picture's projected tokens; used in pretraining alone."""

    def __init__(self, model: LlavaForConditionalGeneration, data: Data) -> None:
        super().__init__()
        counts = Counter(word for place in data.train for word in data.words[place])
        self.words = {word: row for row, word in enumerate(sorted(w for w, n in counts.items() if n > 1))}
        shares = torch.tensor([float(counts[word]) for word in self.words])
        width = vlm.model_config().hidden_size
        self.directions = torch.nn.Parameter(0.02 * torch.randn(len(self.words), width))
        self.bias = torch.nn.Parameter((shares / shares.sum()).log())
        self.model = [model]  # in a list: its parameters are not the head's

    def wanted(self, data: Data, places: Sequence[int]) -> torch.Tensor:
        """Whether a name has a word, float [icons, words]; words of one training icon alone are left out."""
        found = torch.zeros(len(places), len(self.words))
        for row, place in enumerate(places):
            found[row, [self.words[word] for word in data.words[place] if word in self.words]] = 1.0
        return found

    def forward(self, pixels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Mean nats of a word of a name, given the picture."""
        parts = self.model[0].model
        states = parts.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        found = parts.multi_modal_projector(states).mean(1)
        return -(wanted * (found @ self.directions.T + self.bias).log_softmax(-1)).sum() / wanted.sum()


@dataclass
class Part:
    """One part of the run: which parameters, how long, what is minimised."""

    name: str
    parameters: list[torch.nn.Parameter]
    steps: int
    batch_size: int
    muon_lr: float
    loss: Callable[[list[int]], torch.Tensor]
    measure: Callable[[], dict[str, float]]


def run_part(part: Part, config: VlmPretrainConfig, data: Data) -> list[dict[str, Any]]:
    """Train; returns the curve. Rates rise over the warm-up and fall to 0 on a straight line."""
    matrices = [p for p in part.parameters if p.dim() == 2 and min(p.shape) > vlm.PICTURE_TOKENS]
    matrices = [p for p in matrices if max(p.shape) < 1024]  # not embeddings, nor the head's directions
    chosen = {id(p) for p in matrices}
    others = [p for p in part.parameters if id(p) not in chosen]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, part.muon_lr, config.weight_decay), part.muon_lr),
        (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0), config.adamw_lr),
    ]
    curve, recent, seconds = list[dict[str, Any]](), list[float](), 0.0
    drawn = batches(data, part.batch_size, config.seed)
    for step in tqdm(range(1, part.steps + 1), desc=part.name, unit="step", mininterval=10):
        begun = time.perf_counter()
        scale = min(step / (config.warmup * part.steps), 1.0) * (1 - (step - 1) / part.steps)
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * scale
        loss = part.loss(next(drawn))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(part.parameters, 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(float(loss.detach()))
        seconds += time.perf_counter() - begun
        if step % _POINT == 0 or step == part.steps:
            train = sum(recent) / len(recent)
            curve.append({"step": step, "seconds": seconds, "train": train, **part.measure()})
            recent.clear()
            tqdm.write(
                f"{part.name}, step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in curve[-1].items())
            )
    return curve


def _parts(model: LlavaForConditionalGeneration, config: VlmPretrainConfig, data: Data) -> Iterator[Part]:
    draw = torch.Generator().manual_seed(config.seed)
    head, heldout = WordHead(model, data), data.heldout
    encoder = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]

    def word_loss(places: list[int]) -> torch.Tensor:
        """Of pictures in sizes and places that are drawn."""
        return head(data.pictures.drawn(places, draw), head.wanted(data, places))

    @torch.inference_mode()
    def heldout_words() -> dict[str, float]:
        """The same loss of the held-out icons, as tasks have them."""
        pixels = data.pictures.drawn(heldout, None)
        return {"heldout": float(head(pixels, head.wanted(data, heldout)))}

    def full_loss(places: list[int]) -> torch.Tensor:
        """Of the names, by the whole model."""
        return name_loss(model, *data.pictures.text(places), data.pictures.drawn(places, draw))[0]

    yield Part(
        "words", [*encoder, *head.parameters()], config.encoder_steps, config.encoder_batch_size,
        config.encoder_muon_lr, word_loss, heldout_words,
    )  # fmt: skip
    yield Part(
        "names", list(model.parameters()), config.steps, config.batch_size, config.muon_lr, full_loss,
        lambda: measure(model, data),
    )  # fmt: skip


def pretrain_vlm(config: VlmPretrainConfig, out: Path) -> dict[str, Any]:
    """Train the model into `out`; returns the record that is written beside it."""
    memory.keep_freed_memory()
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    data = load_data()
    torch.manual_seed(config.seed)
    model = vlm.untrained_vlm().train()
    curves = {part.name: run_part(part, config, data) for part in _parts(model, config, data)}
    return _write(model, config, data, out, curves)


def _write(
    model: LlavaForConditionalGeneration, config: VlmPretrainConfig, data: Data, out: Path, curves: Any
) -> dict[str, Any]:
    """Write the weights in bf16 and the record of the training."""
    write_model(model, out)
    rounded = model.float().eval()
    record = {
        "config": asdict(config),
        "corpus": data.record,
        "curves": curves,
        "heldout_of_bf16_file": measure(rounded, data),
        "heldout_with_blank_pictures": measure(rounded, data, blank=True),
        "seconds": sum(curve[-1]["seconds"] for curve in curves.values()),
        "cpu_seconds": time.process_time(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {**environment.versions(), **{n: environment.installed_version(n) for n in PACKAGES}},
        "hardware": environment.hardware(),
    }
    write_json(out / "training_record.json", record)
    return record
