"""What a training step asks of a device by stage, counted at a model's true shapes without computing it.

The model, its adapters and the optimizer are built on PyTorch's meta device, where every operation has its
shapes and no values, and whole training steps run there. So the counts are of what the code does, not of what
it is meant to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import environment
from ..core.files import BenchmarkError, write_json
from ..core.settings import REFERENCE, Settings
from ..training.optimizers import check_optimizer, make_optimizer, package_version
from .counting import Cost, Counter, LiveBytes, named_stages
from .shapes import TARGETS, Workload, adapted_model, batches
from .tables import count_table

if TYPE_CHECKING:
    from peft import PeftModel

KIND, FORMAT = "count", 1
# Steps before the one that is counted: the base's state is made, and the taps know how many calls a step has.
WARMUP = 1


@dataclass(frozen=True)
class Device:
    """What a device can do at its best, by its maker's data sheet, and what a launch costs.

    Attributes:
        name: the device.
        bandwidth: of its memory, bytes per second.
        products: floating-point operations per second of matrix products, dense, by dtype.
        source: where these figures are from.
        launch: seconds that the host needs for one kernel.
        launch_source: where that is from.
    """

    name: str
    bandwidth: float
    products: dict[str, float]
    source: str
    launch: float
    launch_source: str

    def seconds(self, cost: Cost) -> float:
        """The least time of one operation: its products, or what it moves, whichever takes longer."""
        computing = sum(amount / self.products[dtype] for dtype, amount in cost.products.items())
        return max(cost.bytes / self.bandwidth, computing)


H100 = Device(
    "H100 SXM 80 GB",
    3.35e12,
    {"bfloat16": 989.5e12, "float16": 989.5e12, "float32": 67e12, "float64": 67e12},
    "NVIDIA H100 Tensor Core GPU data sheet: 3.35 TB/s; 1,979 TFLOP/s in bf16 and fp16 with sparsity, half "
    "of that without; 67 in fp32 and, by tensor cores, in fp64",
    5e-6,
    "an assumption: 4 to 6 µs a launch were measured on another card (susun-blog.com, 'From Launch Overhead "
    "to CUDA Graph'); PyTorch's own dispatch comes on top",
)


def _counted_attention(
    module: torch.nn.Module,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Causal flash attention, the default on a GPU; keys and values are repeated for grouped queries."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def meta_model(workload: Workload) -> PeftModel:
    """The adapted model on the meta device, with flash attention and, as under autocast, adapters in bf16."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class Autocast(torch.nn.Linear):
        """The product in bf16 with weights in fp32. Autocast itself knows no meta tensors."""

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            """``x Wᵀ``."""
            return torch.nn.functional.linear(given.bfloat16(), self.weight.bfloat16())

    # Attention under a name of its own gets no mask, whose values would be looked at.
    ALL_ATTENTION_FUNCTIONS.register("counted", _counted_attention)
    model = adapted_model(replace(workload, device="meta"), attention="counted")
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.requires_grad:
            module.__class__ = Autocast
    return model


def _meta_optimizer(name: str, model: PeftModel, options: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer as it works on a GPU in the steady state."""
    try:
        optimizer = make_optimizer(name, model, Settings(1e-4, options=options))
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"--optimizer {name} cannot be built with --option as given: {error}") from error
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = True  # AdamW's own choice on a GPU
    return optimizer


@dataclass
class _Alive:
    """Bytes alive at points of a step, beside the model's own."""

    at_rest: int = 0
    after_forward: int = 0
    before_step: int = 0
    peak_of_passes: int = 0
    peak_of_step: int = 0


@contextmanager
def _counting(counter: Counter | None, stage: str) -> Iterator[None]:
    if counter is None:
        yield
        return
    with counter, named_stages(counter), counter.within(stage):
        yield


def _step(
    model: PeftModel, optimizer: Any, workload: Workload, counter: Counter | None, live: LiveBytes
) -> _Alive:
    """One training step, under the counter if there is one; returns what was alive when."""
    alive = _Alive(at_rest=live.now)
    live.reset()
    for tokens in batches(replace(workload, device="meta"), workload.accumulation):
        with _counting(counter, "forward"):
            loss = model(input_ids=tokens, labels=tokens).loss / workload.accumulation
        alive.after_forward = max(alive.after_forward, live.now)
        with _counting(counter, "backward"):
            loss.backward()
        del loss
    alive.before_step, alive.peak_of_passes = live.now, live.peak
    live.reset()
    with _counting(counter, "other"):
        optimizer.step()
    alive.peak_of_step = live.peak
    optimizer.zero_grad()
    return alive


def counted_step(
    name: str, workload: Workload, options: dict[str, Any] | None = None
) -> tuple[dict[str, Cost], _Alive, dict[str, dict[str, int]]]:
    """Count a training step: costs by stage, bytes alive at its points, operations by stage.

    Raises:
        BenchmarkError: the optimizer reads values from the device, and there are none.
    """
    model = meta_model(workload)
    counter, live = Counter("meta", H100.seconds), LiveBytes("meta")
    try:
        with live:
            optimizer = _meta_optimizer(name, model, options or {})
            for _ in range(WARMUP):
                _step(model, optimizer, workload, None, live)
            alive = _step(model, optimizer, workload, counter, live)
    except (NotImplementedError, RuntimeError) as error:
        if "meta tensor" not in str(error):
            raise
        raise BenchmarkError(
            f"{name} reads values from the device in its step, so it cannot be counted: {error}"
        ) from error
    costs, operations = (
        dict(counter.costs),
        {stage: dict(found) for stage, found in counter.operations.items()},
    )
    if not hasattr(optimizer, "stage_seconds"):  # no GRIT: all of its step is the base's
        costs["base"], operations["base"] = costs.pop("other"), operations.pop("other")
    if hasattr(optimizer, "close"):
        optimizer.close()
    return costs, alive, operations


def nf4_bytes(model: PeftModel, workload: Workload) -> dict[str, int]:
    """What NF4 adds to the passes, by formula: its kernels know no meta tensors.

    bitsandbytes turns each frozen weight to bf16 before each product (4 bits and its scales read, 16 bits
    written): forward, backward to the layer's input, and once more where activations are recomputed. The
    scales are one byte for 64 weights and one float for 256 of those.
    """
    weights = sum(
        module.base_layer.weight.numel()
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    )
    uses = (3 if workload.checkpointing else 2) * workload.accumulation
    read = weights // 2 + weights // 64 + weights // 64 // 256 * 4
    return {"weights": weights, "uses": uses, "read": read * uses, "written": 2 * weights * uses}


def _plain(costs: dict[str, Cost]) -> dict[str, dict[str, Any]]:
    """Costs by stage as JSON takes them, with the host's time for their launches."""
    return {
        stage: {**cost.plain(), "launch_seconds": cost.launches * H100.launch}
        for stage, cost in costs.items()
    }


def count(
    workload: Workload, optimizer: str, path: Path, options: dict[str, Any] | None = None, **about: Any
) -> dict[str, Any]:
    """Count a step of AdamW and of the optimizer; write the result and print its table."""
    check_optimizer(optimizer)
    plain, plain_alive, _ = counted_step(REFERENCE, workload)
    costs, alive, operations = counted_step(optimizer, workload, options)
    model = meta_model(workload)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    result = {
        "kind": KIND,
        "format": FORMAT,
        "workload": {
            name: value for name, value in asdict(workload).items() if name not in ("device", "quantize")
        },
        "optimizer": optimizer,
        "options": options or {},
        "parameters": {
            "all": sum(p.numel() for p in model.parameters()),
            "trained": sum(sizes),
            "sites": len(sizes) // 2,
        },
        "reference": _plain(plain),
        "stages": _plain(costs),
        "operations": operations,
        "alive_bytes": {"reference": asdict(plain_alive), "optimizer": asdict(alive)},
        "nf4": nf4_bytes(model, workload),
        "device": asdict(H100),
        "versions": environment.versions(),
        "optimizer_package": package_version(optimizer),
        "code": environment.commit(),
        **about,
    }
    write_json(path, result)
    print(count_table(result))
    print(f"written: {path}")
    return result
