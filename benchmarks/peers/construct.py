"""What the peers' factories share: the LoRA pairs of a model, and a call that lets no option go unheard."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from ..core.files import BenchmarkError

if TYPE_CHECKING:
    Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]


def lora_pairs(model: torch.nn.Module) -> list[Pair]:
    """Every LoRA pair as (A [rank, d_in], B [d_out, rank]), in the model's order.

    Raises:
        BenchmarkError: If the model trains something that is no LoRA matrix; a rule for matrices would skip
            it silently, or take it for one half of a pair.
    """
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = []
    for name in [name for name in left if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        if other in left:
            pairs.append((left.pop(name), left.pop(other)))
    if left or not pairs:
        what = f"{len(left)} other parameters are, first {next(iter(left))}" if left else "nothing is"
        raise BenchmarkError(
            f"this optimizer is for LoRA pairs alone (lora_A and lora_B, both trained), but {what}; "
            "train only such adapters, or choose an optimizer that takes any parameter"
        )
    return pairs


def matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The matrices of all pairs as A, B, A, B, ..."""
    return [matrix for pair in lora_pairs(model) for matrix in pair]


def rank_side(model: torch.nn.Module) -> int:
    """The largest LoRA rank, where it is below every other dimension of every adapter.

    Raises:
        BenchmarkError: If it is not: then no limit on the dimension tells the rank side from the other.
    """
    pairs = lora_pairs(model)
    rank = max(down.shape[0] for down, _ in pairs)
    narrowest = min(min(down.shape[1], up.shape[0]) for down, up in pairs)
    if narrowest <= rank:
        raise BenchmarkError(
            f"the rank side cannot be told from the other: the largest rank is {rank}, the narrowest layer "
            f"{narrowest} wide; lower --rank, or take the -full variant"
        )
    return rank


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names that may be given as keywords; what `**kwargs` would swallow is not among them."""
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, one in inspect.signature(function).parameters.items() if one.kind in keyword}


def construct(
    constructor: Callable[..., Any],
    *arguments: Any,
    given: dict[str, Any],
    preset: dict[str, Any] | None = None,
    options: dict[str, Any],
    also: Collection[str] = (),
) -> Any:
    """Call a package's constructor, with the user's options over our presets.

    Args:
        constructor: Class or function of the package.
        *arguments: What it takes by position: the model or the parameters.
        given: Keywords that come from the settings and cannot be options as well.
        preset: Keywords where the benchmark departs from the package's default; options override them.
        options: The user's `--option KEY=VALUE`.
        also: Further names that it passes on by `**kwargs`.

    Raises:
        BenchmarkError: For an option that it has not (several of these packages ignore such), or that is
            given already.
    """
    taken = list(inspect.signature(constructor).parameters)[: len(arguments)]
    known = (_parameters(constructor) | set(also)) - set(taken) - set(given)
    unknown = sorted(set(options) - known)
    if unknown:
        raise BenchmarkError(
            f"{constructor.__name__} takes no option {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(known))} (rate, betas and weight decay have arguments of their own)"
        )
    return constructor(*arguments, **{**(preset or {}), **given, **options})
