"""What processes under FSDP2 send for GRIT: counted from the code at true shapes, without a second process.

The pairs of a model are built on PyTorch's meta device, each process's rows of A and B as FSDP2 holds them,
in a process group that only says how many processes there are. A whole step of the optimizer runs there, and
every message that it asks for is counted. What FSDP2 itself sends is a formula.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from grit_optim import GritOptimizer, Site

from ..core import arguments as read
from ..core.command import Command
from ..core.files import REPOSITORY
from .counting import LiveBytes
from .shapes import SHAPES

OUT = REPOSITORY / "benchmarks" / "results" / "traffic" / "traffic.json"
PROCESSES = (2, 8, 64, 1024)
MODELS = ("llama-3-8b-shape", "llama-3-70b-shape")
MODES = ("spectral", "steer", "inverse", "eigenbasis", "balanced")
"""The first one is counted for all, the others for the first model and :data:`FEW` processes."""
FEW = 8
RANK, TOKENS = 16, 4


@dataclass(frozen=True)
class Row:
    """One process's messages in a step.

    Attributes:
        model: a name in ``SHAPES``.
        processes: how many train together.
        messages: how many messages GRIT asks for.
        sent: bytes that they make the first process send; sums and gatherings by rings.
        fsdp: bytes that FSDP2 makes it send: all weights in bf16 gathered in both passes, gradients of the
            pairs in fp32 reduced.
        fsdp_nf4: the same with linear layers in NF4 (4.127 bits a weight, with double quantization).
        pairs: bytes of A and B in fp32, all of them.
        memory: bytes that GRIT takes up at most during a step, without AdamW's own; None where not counted.
        mode: the value of ``precondition``.
    """

    model: str
    processes: int
    messages: int
    sent: float
    fsdp: float
    fsdp_nf4: float
    pairs: int
    memory: int | None = None
    mode: str = MODES[0]


def linear_layers(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of the linear layers of one decoder layer."""
    d, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim", d // shape["num_attention_heads"])
    q, kv = head * shape["num_attention_heads"], head * shape["num_key_value_heads"]
    return [(q, d), (kv, d), (kv, d), (d, q), (inner, d), (inner, d), (d, inner)]


class Half(nn.Module):
    """A or B: this process's rows, in whose place there is a gathered copy while it is used."""

    def __init__(self, rows: int, columns: int, mesh: Any) -> None:
        super().__init__()
        own = torch.empty(-(-rows // mesh.size()) if rows else 0, columns, device="meta")
        whole: Any = {"shape": torch.Size((rows, columns)), "stride": (columns, 1), "run_check": False}
        shard = nn.Parameter(DTensor.from_local(own, mesh, (Shard(0),), **whole))
        gathered = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.forms = {"shard": shard, "gathered": gathered}  # no attributes: one of them is the parameter
        self.weight = shard

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ``."""
        return x @ self.weight.mT

    def use(self, form: str) -> None:
        """Put the shard or the gathered copy in its place."""
        self.weight = self.forms[form]


@contextmanager
def counted(processes: int) -> Iterator[list[float]]:
    """What every message makes the first process send, in a process group of so many processes, in bytes."""
    seen: list[float] = []
    ring = (processes - 1) / processes

    def gather(out: Tensor, own: Tensor, **_: Any) -> None:
        """By a ring: each process passes on all but one of the parts."""
        seen.append(ring * out.numel() * out.element_size())

    def reduce(tensor: Tensor, **_: Any) -> None:
        """By a ring: sums of parts go round, then the whole sums."""
        seen.append(2 * ring * tensor.numel() * tensor.element_size())

    def exchange(out: Tensor, own: Tensor, gets: list[int], sends: list[int], **_: Any) -> None:
        """To every other process what is for it."""
        seen.append(sum(sends[1:]) * own.element_size())

    torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        with (
            patch.object(torch.distributed, "all_gather_into_tensor", gather),
            patch.object(torch.distributed, "all_gather_single", gather, create=True),
            patch.object(torch.distributed, "all_reduce", reduce),
            patch.object(torch.distributed, "all_to_all_single", exchange),
        ):
            yield seen
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def unseen(base: type[torch.optim.Optimizer]) -> Iterator[None]:
    """Hide the steps of such a base from what counts bytes: DTensor tries its operations on whole shapes."""
    step = base.step

    def quiet(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The base's step, outside of the modes that count."""
        with _disable_current_modes():
            return step(self, *args, **kwargs)

    with patch.object(base, "step", quiet):
        yield


def count(model: str, processes: int, mode: str = MODES[0], steps: int = 3) -> Row:
    """The messages of the last of some steps around AdamW, with new operators in it."""
    shape = SHAPES[model]
    sizes = linear_layers(shape) * shape["num_hidden_layers"]
    with counted(processes) as seen:
        mesh = init_device_mesh("cpu", (processes,))
        pairs = [(Half(RANK, columns, mesh), Half(rows, RANK, mesh)) for rows, columns in sizes]
        halves = [half for pair in pairs for half in pair]
        sites = [Site.from_modules(f"layer {i}", a, b) for i, (a, b) in enumerate(pairs)]
        base = torch.optim.AdamW([half.weight for half in halves], lr=1e-4, foreach=True)
        options: dict[str, Any] = {"precondition": mode, "kfac_update_freq": 1}
        optimizer = GritOptimizer(base, nn.ModuleList(halves), sites=sites, **options)
        for _ in range(steps):
            step(pairs, halves)
            seen.clear()
            with LiveBytes("meta") as live, unseen(torch.optim.AdamW):
                optimizer.step()
        messages = list(seen)
    of_fsdp = _of_fsdp(shape, sizes, (processes - 1) / processes)
    # What is noted of DTensors, to be put back on failure, is tried on whole shapes too.
    peak = None if mode in ("eigenbasis", "balanced") else live.peak
    return Row(model, processes, len(messages), sum(messages), *of_fsdp, peak, mode)


def step(pairs: Sequence[tuple[Half, Half]], halves: Sequence[Half]) -> None:
    """A forward and backward pass through all pairs, and what FSDP2 does around it."""
    for half in halves:
        half.use("gathered")
    x = [torch.empty(TOKENS, a.weight.shape[1], device="meta") for a, _ in pairs]
    torch.stack([b(a(one)).sum() for one, (a, b) in zip(x, pairs, strict=True)]).sum().backward()
    for half in halves:
        half.use("shard")
        half.forms["gathered"].grad = None
        half.weight.grad = torch.empty_like(half.weight)


def _of_fsdp(
    shape: dict[str, Any], sizes: Sequence[tuple[int, int]], ring: float
) -> tuple[float, float, int]:
    linear = sum(rows * columns for rows, columns in sizes)
    others = shape["vocab_size"] * shape["hidden_size"] * (1 if shape.get("tie_word_embeddings") else 2)
    pairs = RANK * sum(rows + columns for rows, columns in sizes)
    reduced = 4 * pairs
    bf16 = ring * (2 * 2 * (linear + others + pairs) + reduced)
    nf4 = ring * (2 * (linear * 4.127 / 8 + 2 * (others + pairs)) + reduced)
    return bf16, nf4, 4 * pairs


def table(rows: Sequence[Row]) -> str:
    """The rows as the page on costs shows them."""
    lines = [
        "| shape | mode | processes | messages | sent, MB | FSDP2, GB | share | FSDP2 with NF4, GB | share "
        "| memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.mode} | {row.processes:,} | {row.messages} | {row.sent / 1e6:,.1f} "
            f"| {row.fsdp / 1e9:.1f} | {row.sent / row.fsdp:.2%} "
            f"| {row.fsdp_nf4 / 1e9:.1f} | {row.sent / row.fsdp_nf4:.2%} "
            f"| {'' if row.memory is None else f'{row.memory / 1e6:,.1f}'} |"
        )
    return "\n".join(lines).replace("%", " %")


def load(path: Path = OUT) -> list[Row]:
    """The rows of a results file."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf8"))["rows"]]


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=read.several(str), default=list(MODELS))
    parser.add_argument("--processes", type=read.several(read.positive_int), default=list(PROCESSES))
    parser.add_argument("--modes", type=read.several(str), default=list(MODES))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "traffic" / OUT.name)


def _run(arguments: argparse.Namespace) -> None:
    rows = [count(model, n) for model in arguments.models for n in arguments.processes]
    rows += [count(arguments.models[0], FEW, mode) for mode in arguments.modes if mode != MODES[0]]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"rank": RANK, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    print(table(rows))


TRAFFIC = Command(
    "traffic", "what processes under FSDP2 send for GRIT in a step, counted at true shapes", _add, _run
)
