"""Which processes train the pairs together: those that the model is wrapped for.

That a process group exists does not mean that its processes train one model: one of them may search learning
rates beside the others. DDP and FSDP2 say so, by what they do to the gradients. DDP may be put around the
model after the optimizer was built, outside of the module that the optimizer knows, so it is looked for at
each step until one has trained something, and in each forward pass.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grit_optim.messages import warn
from grit_optim.processes import shards

AUTO = "auto"
"""The value of ``process_group`` that asks what the model is wrapped in."""


def others_exist() -> bool:
    """Whether a process group with other processes has been set up."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Processes:
    """The processes that train the pairs together with this one.

    Args:
        given: the user's ``process_group``: a group, None for no communication, or ``"auto"``.
        parameters: gives A and B of all pairs.
        model: where FSDP2 may be, if it is known.

    Attributes:
        asked: whether the model is asked, rather than the user.
        takes_part: whether the optimizer was given to a ``Join`` too.
    """

    def __init__(
        self, given: Any, parameters: Callable[[], Sequence[Tensor]], model: nn.Module | None
    ) -> None:
        check_group(given)
        self.asked = isinstance(given, str)
        self._given = None if self.asked else given
        self._parameters = parameters
        self._model = model
        self._sharded: bool | None = None  # not asked in this step
        self._wrapper: weakref.ref[nn.Module] | None = None
        self._of_mesh: Any = None
        self._trained = False
        self._told: set[str] = set()
        self.takes_part = False

    @property
    def kept(self) -> Kept:
        """What a copy of the optimizer is built with."""
        return Kept(AUTO if self.asked else self._given)

    @property
    def group(self) -> Any:
        """The process group; None where this process trains alone."""
        if not self.asked:
            return self._given
        wrapper = self._wrapper() if self._wrapper is not None else None
        return self._of_mesh if wrapper is None else wrapper.process_group

    @property
    def size(self) -> int:
        """How many processes train together."""
        group = self.group
        return 1 if group is None else torch.distributed.get_world_size(group)

    @property
    def writes(self) -> bool:
        """Whether this process writes files: the first, where all have to take part in making them."""
        self.look()
        return self._of_mesh is None or torch.distributed.get_rank(self._of_mesh) == 0

    @property
    def left_out(self) -> bool:
        """Whether processes without inputs take part in what DDP exchanges, and not in what we would.

        They do under ``Join([model])``. Says so once.
        """
        wrapper = self._wrapper() if self._wrapper is not None else None
        joined = getattr(getattr(wrapper, "_join_config", None), "enable", False)
        if not joined or self.takes_part or self.size == 1:
            return False
        self._say(
            "join",
            "the model is under a Join that does not know the GritOptimizer, so no statistics are exchanged: "
            "the base steps by what the factors were before. Write Join([model, optimizer])",
        )
        return True

    def look(self) -> None:
        """Look for what the model is wrapped in, unless that is known or a bare model has been trained.

        Raises:
            NotImplementedError: pairs are wrapped for different groups.
            ValueError: the user names other processes than those that FSDP2 shares the pairs out to.
        """
        self._sharded = None
        if not others_exist():
            return
        layouts = [shards.layout_of(p) for p in self._parameters()]
        meshes = {id(layout.mesh): layout.mesh for layout in layouts if layout is not None}
        if meshes:
            self._of_mesh = only([shards.group_of_mesh(mesh) for mesh in meshes.values()])
            if not self.asked and self._given is not self._of_mesh:
                raise ValueError(
                    f"process_group={self._given} is not the processes that FSDP2 shares A and B out to, and "
                    "what each of them holds is a part of the same matrices. Leave process_group out"
                )
            return
        known = self._wrapper is not None and self._wrapper() is not None
        if self.asked and not known and not self._trained:
            self._wrapper = None
            self._take(wrappers_of(self._parameters()))

    def sharded(self) -> bool:
        """Whether FSDP2 manages the model or a part of it."""
        if self._sharded is None:
            fsdp: Any = sys.modules.get("torch.distributed.fsdp")
            modules = self._model.modules() if self._model is not None and fsdp is not None else ()
            self._sharded = any(isinstance(module, fsdp.FSDPModule) for module in modules)
        return self._sharded

    def note_forward(self) -> None:
        """Take note of the DDP module whose forward pass is under way, if one is."""
        if self.asked and not torch.compiler.is_compiling():
            wrapper = DistributedDataParallel._active_ddp_module
            if wrapper is not None and (self._wrapper is None or self._wrapper() is not wrapper):
                self._take([wrapper])

    def trained(self) -> None:
        """Take note that the coming step trains something. A bare model is not looked at again.

        Says once that it is trained alone, where there are other processes.
        """
        self._trained = True
        if self.asked and self.group is None and others_exist():
            found = (
                "FSDP2 leaves all of its pairs alone (ignored_params)"
                if self.sharded()
                else "the model is wrapped in neither DDP nor FSDP2"
            )
            self._say(
                "alone",
                f"a process group of {torch.distributed.get_world_size()} processes exists, and {found}, so "
                "GritOptimizer takes it that this process trains them alone, and exchanges nothing. If the "
                "processes average gradients in another way, pass "
                "GritOptimizer(..., process_group=torch.distributed.group.WORLD); pass process_group=None "
                "to say that this is as it should be",
            )

    def _say(self, subject: str, message: str) -> None:
        if subject not in self._told:
            self._told.add(subject)
            warn(message)

    def _take(self, wrappers: Sequence[nn.Module]) -> None:
        if wrappers:
            only([wrapper.process_group for wrapper in wrappers])
            self._wrapper = weakref.ref(wrappers[0])


class Kept:
    """The user's ``process_group`` in an optimizer's state: copies keep a group, a pickle cannot."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __deepcopy__(self, memo: Any) -> Kept:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        whole = self.given is None or isinstance(self.given, str)
        return (Kept, (self.given,)) if whole else (_without_group, ())


def _without_group() -> Kept:
    warn(
        "the GritOptimizer that is unpickled was built with a process group, which no pickle can hold. It "
        "now asks what the model is wrapped in (process_group='auto'). If that is not it, build a new one "
        "with process_group= and load the state dict"
    )
    return Kept(AUTO)


def check_group(given: object) -> None:
    """Refuse what is no process group.

    Raises:
        TypeError: it is neither a group, nor None, nor "auto".
        ValueError: this process is not in the group, or it is another word.
    """
    if given is None or given == AUTO:
        return
    distributed = torch.distributed
    if distributed.is_available() and given is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group is a group that this process is not a member of. Build the optimizer in the "
            "group's processes alone, or pass None in the others"
        )
    if isinstance(given, str):
        raise ValueError(
            f"process_group={given!r} is unknown: pass a torch.distributed group, None for no communication, "
            "or 'auto' to ask what the model is wrapped in"
        )
    if not distributed.is_available() or not isinstance(given, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed process group, None or 'auto', got "
            f"{type(given).__name__}. dist.new_group() and device_mesh.get_group() return one"
        )


def wrappers_of(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The living DDP modules that hold any of these parameters, the outermost and the inner ones.

    A module does not know what it is wrapped in, so the garbage collector is asked.
    """
    ids = {id(p) for p in parameters}
    found: list[nn.Module] = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [module for module in found if any(id(p) in ids for p in module.parameters())]


def only(groups: Sequence[Any]) -> Any:
    """The one process group of all pairs.

    Raises:
        NotImplementedError: there are several.
    """
    if len({id(group) for group in groups}) > 1:
        raise NotImplementedError(
            f"the pairs are wrapped for {len(groups)} different process groups. Build a GritOptimizer for "
            "the pairs of each group, or pass the one whose processes train all of them as process_group="
        )
    return groups[0]
