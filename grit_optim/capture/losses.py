"""The loss of each step, as the user, a closure or the model's output tells it, not read from the device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from grit_optim.capture import processes
from grit_optim.processes.group import Processes


class OutputTap:
    """Forward hook on the whole model that takes note of ``output.loss``.

    It holds its collector weakly, so that no model keeps an optimizer alive.
    """

    def __init__(self, losses: Losses | None) -> None:
        self._losses = weakref.ref(losses) if losses is not None else None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Take the loss of a training pass. Evaluation builds no graph, so its losses are left out.

        Where the caller passes ``num_items_in_batch``, as transformers' Trainer does, the loss is this
        micro-batch's share of the step's loss. Else it is the micro-batch's mean.
        """
        losses = self._losses() if self._losses is not None else None
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if losses is not None and isinstance(loss, Tensor) and loss.requires_grad:
            losses.from_output(loss, is_share=kwargs.get("num_items_in_batch") is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OutputTap, (None,)


class Losses:
    """Collects the losses between two steps.

    A loss that the user observed counts before the closure's, and the closure's before the model's own.

    Args:
        together: the processes that train together.
    """

    def __init__(self, together: Processes) -> None:
        self._processes = together
        self._observed: list[Tensor | float] = []
        self._outputs: list[Tensor | float] = []
        self._shares = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def attach(self, model: nn.Module | None) -> None:
        """Watch the outputs of ``model`` from now on."""
        if model is not None and self._hook is None:
            self._hook = model.register_forward_hook(OutputTap(self), with_kwargs=True)

    def detach(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def observe(self, loss: Tensor | float) -> None:
        """Take a loss that the user hands over.

        Raises:
            TypeError: it is neither a number nor a tensor.
            ValueError: it is a tensor of several values.
        """
        self._observed.append(_single(loss))

    def from_output(self, loss: Tensor, is_share: bool = False) -> None:
        """Take a loss that the model put out, one of several values as their mean.

        Args:
            loss: the loss of a micro-batch.
            is_share: whether it is the micro-batch's share of the step's loss, rather than a mean of its own.
        """
        self._shares = is_share
        self._outputs.append(loss.detach().float().mean())

    def take(self, returned: Any = None, shared_on: torch.device | None = None) -> Tensor | float | None:
        """The loss of this step over all its micro-batches; None if no source told one. Forgets it.

        Args:
            returned: what the closure returned.
            shared_on: the device on which all processes take the mean of their losses; None: keep this
                process's own.
        """
        if not self._observed and _is_single(returned):
            self._observed.append(_single(returned))
        seen = self._observed or self._outputs
        count = 1 if self._shares and not self._observed else len(seen)
        self._observed, self._outputs = [], []
        own = sum(seen[1:], seen[0]) / count if seen else None
        if shared_on is None or self._processes.size == 1:
            return own
        return processes.mean_loss(own, shared_on, self._processes.group)


def _is_single(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1)


def _single(loss: Tensor | float) -> Tensor | float:
    """A loss as one number, on its device.

    Raises:
        TypeError: it is neither a number nor a tensor.
        ValueError: it is a tensor of several values.
    """
    if isinstance(loss, bool) or not isinstance(loss, Tensor | float | int):
        raise TypeError(
            "observe() takes the loss of this step, a number or a tensor of one value, got "
            f"{type(loss).__name__}"
        )
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1:
        raise ValueError(
            f"observe() takes one loss, got a tensor of shape {list(loss.shape)}; pass loss.mean()"
        )
    return loss.detach().float().reshape(())
