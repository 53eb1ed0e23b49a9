"""The optimizers of bitsandbytes: which update they make, and their moments, which they store in 8 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SQUARES_FIRST = ("adagrad", "rmsprop")  # kernels of bitsandbytes whose ``state1`` holds squared gradients


def kernel(base: Optimizer) -> str | None:
    """The name of the update that a bitsandbytes optimizer makes, such as ``"adam"``; None for any other."""
    theirs = any(kind.__module__.startswith("bitsandbytes") for kind in type(base).__mro__)
    return getattr(base, "optimizer_name", None) if theirs else None


def dequantized(state: dict[str, Any], which: str) -> Tensor | None:
    """The moment ``state1`` or ``state2``, in fp32 where it is stored in 8 bits by blocks; None if absent.

    Args:
        state: the state of one parameter.
        which: ``"1"`` or ``"2"``.
    """
    value = state.get(f"state{which}")
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        return value
    from bitsandbytes import functional

    scales = state[f"absmax{which}"]
    return functional.dequantize_blockwise(
        value, absmax=scales, code=state[f"qmap{which}"], blocksize=_block_size(value, scales)
    )


def quantize(state: dict[str, Any], value: Tensor) -> None:
    """Write ``value`` into ``state1``, which is stored in 8 bits by blocks.

    Args:
        state: the state of one parameter.
        value: the moment, as many entries as ``state1`` has.
    """
    from bitsandbytes import functional

    codes, scales = state["state1"], state["absmax1"]
    contiguous = value.to(torch.float32).reshape(codes.shape).contiguous()
    stored, found = functional.quantize_blockwise(
        contiguous, code=state["qmap1"], blocksize=_block_size(codes, scales)
    )
    codes.copy_(stored)
    scales.copy_(found.absmax)


def _block_size(codes: Tensor, scales: Tensor) -> int:
    """Entries per scale, a power of two. The last block may be incomplete."""
    return 2 ** math.ceil(math.log2(codes.numel() / scales.numel()))
