"""Counts what a piece of training asks of a device: products, bytes, kernels, and memory that is alive.

The operations are seen as PyTorch hands them to its kernels (``TorchDispatchMode``), so nothing is guessed of
what the code does; on the meta device they are seen at their true shapes and nothing is computed. What an
operation costs follows from its
tensors: products have a formula each (``torch.utils.flop_counter``), every other operation counts one per
element of its largest tensor, and every tensor is read or written once. A kernel that keeps what it needs in
a cache reads less, one that needs several passes more.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from grit_optim.profiling import StageTimes

# Another view of the same memory: nothing is launched, nothing is made.
_VIEWS = frozenset((
    "view", "_unsafe_view", "detach", "alias", "expand", "transpose", "t", "permute", "select", "slice",
    "unsqueeze", "squeeze",
    "unbind", "split", "split_with_sizes", "diagonal", "as_strided", "_reshape_alias", "lift_fresh",
    "promote_types",
    "_record_function_enter_new", "_record_function_exit",
))  # fmt: skip
# Memory without contents.
_EMPTY = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
# What these write they do not read first.
_OVERWRITTEN = frozenset(("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"))
# These read as many entries of their first argument as they give back, not all of it.
_CHOOSING = frozenset(("index", "index_select", "gather", "embedding"))
# aten/src/ATen/native/cuda/MultiTensorApply.cuh: lists that go through a kernel together, by their number,
# and how much.
_LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_LIST_BLOCKS, _LIST_CHUNK = 320, 65_536
_CAT_TENSORS = 128  # aten/src/ATen/native/cuda/Shape.cu: CAT_ARRAY_BATCH_SIZE


@dataclass
class Cost:
    """What some operations ask of a device.

    Attributes:
        calls: operations that compute or move something.
        launches: kernels that this takes at the least: one for each call, and for operations on lists of
            tensors as many as CUDA's own limits per kernel make of them.
        products: floating-point operations of matrix products, by the operands' dtype.
        elementwise: one for every element of an operation's largest tensor, of all other operations.
        read: bytes.
        written: bytes.
        device_seconds: the least time on a device that the counter was given: for each operation its products
            or what it moves, whichever takes longer.
    """

    calls: int = 0
    launches: int = 0
    products: dict[str, int] = field(default_factory=dict)
    elementwise: int = 0
    read: int = 0
    written: int = 0
    device_seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products, whatever their dtype."""
        return sum(self.products.values())

    def add(self, other: Cost) -> None:
        """Add the amounts of another cost."""
        for name in ("calls", "launches", "elementwise", "read", "written", "device_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for dtype, amount in other.products.items():
            self.products[dtype] = self.products.get(dtype, 0) + amount

    def plain(self) -> dict[str, Any]:
        """The fields as a dict, for JSON."""
        return asdict(self)


def _name(function: Any) -> str:
    """The operation's name without namespace and overload, as in ``add_``."""
    return str(function._overloadpacket.__name__)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's different elements: an expanded dimension is stored once."""
    sizes = [
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0
    ]
    return int(torch.Size(sizes).numel()) * tensor.element_size()


def list_launches(sizes: Iterable[int], depth: int) -> int:
    """Kernels that CUDA makes of one operation on ``depth`` lists of tensors with so many elements each.

    A kernel takes chunks of 65,536 elements until it has 320 of them, or as many tensors as fit into its
    arguments.
    """
    launches, tensors, blocks = 0, 0, 0
    for size in sizes:
        chunks = -(-size // _LIST_CHUNK)
        tensors += 1 if chunks else 0
        while chunks:
            taken = min(chunks, _LIST_BLOCKS - blocks)
            blocks, chunks = blocks + taken, chunks - taken
            if blocks == _LIST_BLOCKS or (not chunks and tensors == _LIST_TENSORS[depth]):
                launches, blocks, tensors = launches + 1, 0, 1 if chunks else 0
    return launches + (blocks > 0)


def _lists(name: str, arguments: tuple[Any, ...]) -> list[list[Tensor]]:
    """The lists of tensors that a ``cat``, ``stack`` or ``_foreach_`` operation goes through; else none."""
    if name not in ("cat", "stack") and not name.startswith("_foreach_"):
        return []
    return [found for value in arguments if isinstance(value, list | tuple) and (found := _tensors(value))]


def _launches(name: str, arguments: tuple[Any, ...]) -> int:
    """Kernels of one operation, at the least."""
    if name in ("cat", "stack"):
        return -(-len(arguments[0]) // _CAT_TENSORS)
    if name == "eye":
        return 2  # zeros, then the diagonal
    if name.startswith("_foreach_"):
        lists = _lists(name, arguments)
        return list_launches((t.numel() for t in lists[0]), len(lists) + (0 if name.endswith("_") else 1))
    return 1


def _written_arguments(function: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Tensors among the arguments that the operation changes in place."""
    declared = function._schema.arguments
    changed = [
        v
        for a, v in zip(declared, arguments, strict=False)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return _tensors(changed)


def _products(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a matrix product or a factorisation; 0 for anything else."""
    known = flop_registry.get(function._overloadpacket)
    if known is not None:
        return int(known(*arguments, **keywords, out_val=out))
    name = _name(function)
    first = next((t for t in _tensors(arguments)), None)
    if name == "dot" and first is not None:
        return 2 * first.numel()
    if name in ("_linalg_eigh", "linalg_cholesky_ex", "cholesky_inverse") and first is not None:
        # Golub and Van Loan, Matrix Computations: with eigenvectors about 9 n³; n³/3; 2 n³/3.
        factor = {"_linalg_eigh": 9.0, "linalg_cholesky_ex": 1 / 3, "cholesky_inverse": 2 / 3}[name]
        return round(factor * first.numel() * first.shape[-1])
    return 0


def cost_of(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> Cost:
    """What one operation asks of a device."""
    name = _name(function)
    inputs, outputs = _tensors((arguments, keywords)), _tensors(out)
    changed = _written_arguments(function, arguments)
    in_place = {id(t) for t in changed}
    new = [t for t in outputs if id(t) not in in_place]
    read = [t for t in inputs if name not in _OVERWRITTEN or id(t) not in in_place]
    amount = sum(map(stored_bytes, read))
    if name in _CHOOSING:
        amount += min(0, sum(map(stored_bytes, new)) - stored_bytes(inputs[0]))
    if name == "index_add_":  # only the chosen rows of the target are touched
        source = stored_bytes(arguments[3])
        amount, written = amount - stored_bytes(inputs[0]) + source, source
    else:
        written = sum(map(stored_bytes, [*changed, *new]))
    products = _products(function, arguments, keywords, out)
    cost = Cost(1, _launches(name, arguments), read=amount, written=written)
    if products:
        cost.products[str(inputs[0].dtype).removeprefix("torch.")] = products
    else:
        lists = _lists(name, arguments)
        largest = max((t.numel() for t in [*inputs, *outputs]), default=0)
        cost.elementwise = sum(t.numel() for t in lists[0]) if lists else largest
    return cost


class Counter(TorchDispatchMode):
    """Adds up what runs inside its ``with`` statement, by the stage that it runs in.

    ``seconds`` gives an operation's least time on some device.

    Attributes:
        stage: the name that costs are booked under now.
        costs: amounts by stage.
        operations: how often each operation ran, by stage.
    """

    def __init__(self, device: str, seconds: Callable[[Cost], float] = lambda cost: 0.0) -> None:
        super().__init__()
        self._device = device
        self._seconds = seconds
        self.stage = "other"
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.operations: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and book what it asks for, if it is one of the device's."""
        out = func(*args, **(kwargs or {}))
        name = _name(func)
        if name in _VIEWS or name in _EMPTY:
            return out
        if any(t.device.type == self._device for t in _tensors((out, args, kwargs))):
            cost = cost_of(func, args, kwargs or {}, out)
            cost.device_seconds = self._seconds(cost)
            self.costs[self.stage].add(cost)
            self.operations[self.stage][name] += 1
        return out

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Book the operations of the body of a ``with`` statement under `stage`."""
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before

    def total(self) -> Cost:
        """The sum over all stages."""
        total = Cost()
        for cost in self.costs.values():
            total.add(cost)
        return total


@contextmanager
def named_stages(counter: Counter) -> Iterator[None]:
    """Book GRIT's operations under the stages that its telemetry names."""
    timed = StageTimes.__call__

    @contextmanager
    def entered(self: StageTimes, stage: str) -> Iterator[None]:
        """Time the stage as before, and book its operations under its name."""
        with counter.within(stage), timed(self, stage):
            yield

    setattr(StageTimes, "__call__", entered)  # noqa: B010 - a plain assignment to a method is no valid typing
    try:
        yield
    finally:
        setattr(StageTimes, "__call__", timed)  # noqa: B010


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside its ``with`` statement and are still alive.

    Attributes:
        now: bytes alive.
        peak: the most there have been since :meth:`reset`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self._known: set[int] = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and take note of the storages that it made."""
        out = func(*args, **(kwargs or {}))
        name = _name(func)
        if name in _VIEWS or (name.endswith("_") and not name.startswith("__")):
            return out
        for tensor in _tensors(out):
            if tensor.device.type == self._device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def reset(self) -> None:
        """Let the peak start again from what is alive now."""
        self.peak = self.now
