"""One LoRA pair of a model, called a *site*.

Its matrices ``A`` ``[r, d_in]`` (``lora_A.weight``) and ``B`` ``[d_out, r]`` (``lora_B.weight``) add
``s·B·A·x`` to the output of a frozen layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grit_optim.integrity.undo import set_data
from grit_optim.lora.modality import check_modality
from grit_optim.processes import shards

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Site:
    """One LoRA pair of a model.

    The modules are looked up anew at each access, since PEFT may replace them.

    Attributes:
        name: the layer's name in the model and the adapter's, as in
            ``base_model.model.model.layers.0.self_attn.q_proj.default``. It keys the state in checkpoints.
        adapter: the adapter's name, the key of the pair in the mappings that follow.
        a_modules: adapter name to the module whose weight is A and whose output is h = A x; or to A itself.
        b_modules: adapter name to the module whose weight is B, or to B itself.
        scalings: adapter name to s.
        layer_bias: the bias of the frozen layer, where PEFT trains and saves it with the adapter
            (``bias="lora_only"``); else None.
        untapped: why no module's output is h; None if there is one. The curvature of such a pair comes from
            its gradients.
        experts: how many pairs share A and B, as PEFT stacks those of a layer's experts.
        expert: which of them this one is.
        modality: "vision", "audio", "cross_modal" or "text"; None in a model that is not multimodal.
    """

    name: str
    adapter: str
    a_modules: Mapping[str, Any]
    b_modules: Mapping[str, Any]
    scalings: Mapping[str, float]
    layer_bias: Tensor | None = None
    untapped: str | None = None
    experts: int = 1
    expert: int = 0
    modality: str | None = None

    @property
    def tap(self) -> nn.Module:
        """The module whose output is h = A x, shape ``[..., r]`` (``[N, r, ...]`` if it is a convolution)."""
        return self.a_modules[self.adapter]

    @property
    def a(self) -> Tensor:
        """A, ``[r, d_in]`` (``[r, c_in, k, k]`` for a convolution; all experts' rows where they share it)."""
        return weight_of(self.a_modules[self.adapter])

    @property
    def b(self) -> Tensor:
        """B, ``[d_out, r]`` (``[d_out, r, 1, 1]`` for a convolution; all columns where experts share it)."""
        return weight_of(self.b_modules[self.adapter])

    @property
    def fixed(self) -> bool:
        """Whether the pair's coordinates cannot be changed, nor its rank."""
        return self.untapped is not None and self.untapped != NO_MODULE

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.a.shape[0] // self.experts

    @property
    def parameters(self) -> int:
        """Entries of A and B together."""
        return (self.a.numel() + self.b.numel()) // self.experts

    def part_of(self, matrix: Tensor, side: str) -> Tensor:
        """The pair's own part of a tensor in the shape of A (side "A") or B; all where no others share it."""
        if self.experts == 1:
            return matrix
        start = self.expert * self.rank
        return matrix[start : start + self.rank] if side == "A" else matrix[:, self.expert :: self.experts]

    @property
    def has_gradient(self) -> bool:
        """Whether A or B has a gradient now."""
        return self.a.grad is not None or self.b.grad is not None

    @property
    def scaling(self) -> float:
        """The factor s in ΔW = s·B·A."""
        return float(self.scalings[self.adapter])

    @property
    def channel_dim(self) -> int:
        """The dimension of h that has length r, counted from the end.

        A convolution's input may come without a batch dimension, so counting from the front would not do.
        """
        return 1 - self.a.dim() if isinstance(self.a_modules[self.adapter], _CONVOLUTIONS) else -1

    @property
    def has_bias(self) -> bool:
        """Whether B adds a bias of its own (PEFT's ``lora_bias``). Its effect does not depend on the rank."""
        return getattr(self.b_modules[self.adapter], "bias", None) is not None

    @property
    def trains_bias(self) -> bool:
        """Whether PEFT saves a bias with the pair. A saved adapter without the pair lacks that bias too."""
        return self.has_bias or self.layer_bias is not None

    @property
    def in_peft(self) -> bool:
        """Whether a PEFT layer holds the pair. If not, it is hand-written LoRA."""
        return isinstance(self.a_modules, nn.ModuleDict)

    def narrow_(self, rank: int) -> None:
        """Cut A, B and their gradients to the leading ``rank`` directions, in place.

        The Parameter objects stay the same, so that nothing that holds them has to be told.

        Args:
            rank: how many directions stay.
        """
        _narrow(self.a, 0, rank)
        _narrow(self.b, 1, rank)
        for module, names in (
            (self.a_modules[self.adapter], ("out_features", "out_channels")),
            (self.b_modules[self.adapter], ("in_features", "in_channels")),
        ):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, rank)

    @property
    def deleted(self) -> bool:
        """Whether PEFT has deleted the adapter. Nothing but the name can be asked then."""
        return self.adapter not in self.a_modules or self.adapter not in self.b_modules

    def holds(self, a: Tensor, b: Tensor) -> bool:
        """Whether ``a`` and ``b`` are still the pair's weights; PEFT may replace or delete the adapter."""
        return not self.deleted and self.a is a and self.b is b

    @classmethod
    def from_modules(
        cls, name: str, a: nn.Module, b: nn.Module, scaling: float = 1.0, modality: str | None = None
    ) -> Site:
        """A site of hand-written LoRA.

        Args:
            name: keys the site's state in checkpoints.
            a: maps x to h = A x; its ``weight`` is A ``[r, d_in]``.
            b: maps h to B h; its ``weight`` is B ``[d_out, r]``.
            scaling: the factor s in ΔW = s·B·A.
            modality: see the attribute.

        Raises:
            ValueError: a weight is missing, the ranks of A and B do not agree, or an unknown modality.
        """
        for label, module in (("a", a), ("b", b)):
            if not isinstance(getattr(module, "weight", None), Tensor):
                raise ValueError(
                    f"site {name!r}: `{label}` is a {type(module).__name__} without a `weight` tensor. Pass "
                    "the module (such as nn.Linear) whose weight is the LoRA matrix"
                )
        return _checked(cls(name, "", {"": a}, {"": b}, {"": scaling}, modality=modality))

    @classmethod
    def from_parameters(
        cls, name: str, a: Tensor, b: Tensor, scaling: float = 1.0, modality: str | None = None
    ) -> Site:
        """A site of LoRA without modules, as fused layers hold it. Its curvature comes from its gradients.

        Args:
            name: keys the site's state in checkpoints.
            a: A ``[r, d_in]``.
            b: B ``[d_out, r]``.
            scaling: the factor s in ΔW = s·B·A.
            modality: see the attribute.

        Raises:
            TypeError: ``a`` or ``b`` is no tensor.
            ValueError: the ranks of A and B do not agree, or an unknown modality.
        """
        for label, matrix in (("a", a), ("b", b)):
            if not isinstance(matrix, Tensor):
                raise TypeError(
                    f"site {name!r}: `{label}` is a {type(matrix).__name__}. Pass the parameter itself, or "
                    "use Site.from_modules"
                )
        pair = cls(name, "", {"": a}, {"": b}, {"": scaling}, untapped=NO_MODULE, modality=modality)
        return _checked(pair)


NO_MODULE = "it was given as parameters, without the module that multiplies by A"


def weight_of(entry: Any) -> Tensor:
    """The matrix that an entry of a site's mappings is, or holds as its ``weight``."""
    return shards.shard_of(held_by(entry))


def held_by(entry: Any) -> Tensor:
    """As :func:`weight_of`; where FSDP2 has gathered the matrix for use, that copy."""
    return entry if isinstance(entry, Tensor) else entry.weight


def _checked(site: Site) -> Site:
    """The site, if it is a pair of a known modality or of none.

    Raises:
        ValueError: it is not.
    """
    if problem := mismatch(site):
        raise ValueError(f"site {site.name!r}: {problem}. A must be [r, d_in] and B [d_out, r]")
    if site.modality is not None:
        check_modality(f"site {site.name!r}", site.modality)
    return site


def _narrow(parameter: Tensor, dim: int, size: int) -> None:
    """Cut ``parameter`` and its gradient to the first ``size`` entries of ``dim``, keeping the object."""
    gradient, kept = parameter.grad, parameter.detach().narrow(dim, 0, size).clone()
    parameter.grad = None
    set_data(parameter, kept)
    if gradient is not None:
        parameter.grad = gradient.narrow(dim, 0, size).clone()


def alpha_for(scaling: float, rank: int, rank_stabilized: bool) -> float:
    """The ``lora_alpha`` that gives the scaling s at rank r: s·r, or s·√r with rsLoRA.

    It is an int where it is a whole number, as PEFT's own.
    """
    alpha = scaling * (math.sqrt(rank) if rank_stabilized else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def mismatch(site: Site) -> str | None:
    """Why the pair cannot be used as A ``[r, …]`` and B ``[d_out, r]``; None if it can."""
    a, b = site.a, site.b
    if a.numel() == 0 or b.numel() == 0:
        return "its weights are empty here (ZeRO-3 partitions them)"
    if getattr(site.b_modules[site.adapter], "groups", 1) != 1:
        return "B is a grouped convolution"
    if a.dim() < 2 or b.dim() < 2 or b.shape[1] != a.shape[0]:
        return f"A has shape {list(a.shape)} and B {list(b.shape)}"
    return None
