"""A ``torch.optim.Optimizer`` that stands for another one, its base.

``param_groups``, ``state`` and ``defaults`` are the base's own, reached through properties: a reference to
the list would go stale as soon as the base loads a state dict. Other attributes of the base are not passed
on. With ``_step_supports_amp_scaling``, for one, a GradScaler would hand over gradients that are still
scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.distributed.algorithms.join import Join
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from grit_optim.base.callers import asked_by_name, names_of_state_asked
from grit_optim.base.loaded import check_loaded, settings_of
from grit_optim.messages import warn
from grit_optim.processes.group import Processes
from grit_optim.processes.join import Shadow, device_of


class OwnState(Protocol):
    """The state that a wrapper keeps beside the base's."""

    def follow_groups(self) -> None:
        """Take note that the base's parameter groups are others now."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain containers."""

    def state_by_parameter(self, state: Mapping[Any, Any]) -> Any:
        """The base's state of each parameter, with our own beside it."""

    def names_of_state(self) -> Any:
        """Each parameter with the names of what :meth:`state_by_parameter` has of it."""

    def collect_state(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """Take our own state out of one in which it lies with the parameters'; None if it does not."""

    def check_state_dict(self, own: Mapping[str, Any]) -> None:
        """Raise an error if ``own`` cannot be loaded. Called before anything is changed."""

    def loading(self) -> AbstractContextManager[None]:
        """Puts everything back, the base's part too, if the body raises."""

    def load_state_dict(self, own: Mapping[str, Any] | None) -> None:
        """Go on from a saved state; from None, start anew."""

    def exchange(self) -> None:
        """Take part, with nothing of one's own, in what the processes exchange in a step."""

    @property
    def processes(self) -> Processes:
        """Those that train together."""


class OptimizerWrapper(Optimizer):
    """What every wrapper of an optimizer needs, except a step.

    Attributes:
        base: the optimizer that holds the parameters.
        state_key: the key of the state dict under which the wrapper's own state lies. torch's loaders ignore
            it.
    """

    base: Optimizer
    state_key: str
    _own: OwnState

    def _wrap(self, base: Optimizer, own: OwnState) -> None:
        """Stand for ``base`` from now on, with ``own`` state beside it; replaces ``Optimizer.__init__``."""
        self.base, self._own = base, own
        # Sets up the dicts of hooks and the profiled step, without touching the base's groups.
        Optimizer.__setstate__(self, {})
        # Methods of schedule-free optimizers. A trainer asks whether they exist.
        for name in ("train", "eval"):
            if callable(getattr(base, name, None)):
                setattr(self, name, getattr(base, name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Set the base optimizer's ``param_groups``."""
        self.base.param_groups = groups
        self._own.follow_groups()

    @property
    def state(self) -> Any:
        """The base optimizer's state of each parameter. The wrapper keeps nothing in it.

        ``torch.distributed.checkpoint`` is shown the names of what :meth:`state_dict` adds for it.
        """
        return self._own.names_of_state() if names_of_state_asked() else self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        """Set the base optimizer's ``state``."""
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        """Set the base optimizer's ``defaults``."""
        self.base.defaults = defaults

    def join_hook(self, **kwargs: Any) -> Shadow:
        """For ``Join([model, optimizer])``: what this process does once it has run out of inputs."""
        self._own.processes.look()
        self._own.processes.takes_part = True
        return Shadow(self, self._own.processes, self._own.exchange)

    @property
    def join_process_group(self) -> Any:
        """The group that :class:`Join` asks for: of the processes that train together."""
        return self._own.processes.group

    @property
    def join_device(self) -> torch.device:
        """The device that :class:`Join` exchanges its counts on."""
        return device_of(self)

    def _tell_join(self) -> None:
        """Tell a :class:`Join` that this process still has inputs, where the optimizer is its first."""
        if getattr(self, "_join_config", None) is not None:
            Join.notify_join_context(self)  # type: ignore[arg-type]  # asks for the three above

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        with torch.autograd.profiler.record_function(f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"):
            self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the base another parameter group."""
        self.base.add_param_group(param_group)
        self._own.follow_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the wrapper's own state under :attr:`state_key`."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.base.state_dict()
        if asked_by_name():
            state["state"] = self._own.state_by_parameter(state["state"])
        else:
            state[self.state_key] = self._own.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = changed if changed is not None else state
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the plain base; the wrapper's own state then starts anew.

        Whatever is raised, by the base too, nothing has been changed then.

        Raises:
            ValueError: the wrapper's part does not belong to these parameters, or an entry of either part is
                missing, of the wrong type or shape, out of range, or not finite.
        """
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = dict(changed) if changed is not None else state
        own = state.pop(self.state_key, None)
        if own is None:
            state, own = self._own.collect_state(state)
        if own is not None:
            self._own.check_state_dict(own)
        elif state.get("state"):
            warn(
                f"the state to load has no {self.state_key!r} in it, so the curvature starts anew. That is "
                f"as it should be where the base alone saved it. If {type(self).__name__} did, something has "
                "dropped that part, and 'eigenbasis' and 'balanced' would read moments in other coordinates "
                "than they are in: resume from a whole checkpoint there"
            )
        settings = settings_of(self.base)
        with self._own.loading():
            self.base.load_state_dict(state)
            check_loaded(self.base, settings)
            self._own.load_state_dict(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def step_within(base: Optimizer) -> None:
    """Step the base as a part of the wrapper's own step.

    Hooks on the steps of all optimizers (``torch.optim.optimizer.register_optimizer_step_pre_hook``) have
    run for the wrapper, or will. Here they are left out, so that they run once a step.
    """
    hooks: tuple[dict[int, Any], ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    kept = [dict(those) for those in hooks]
    try:
        for those in hooks:
            those.clear()
        base.step()
    finally:
        for those, before in zip(hooks, kept, strict=True):
            those.update({**before, **those})


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """What the closure returns, run with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
