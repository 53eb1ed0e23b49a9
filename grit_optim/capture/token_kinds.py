"""Which tokens of a language model are text, and which stand for pictures or sound.

The ids of a multimodal model's input say it: the configuration names the ids in whose place the encoders'
output stands. A hook on the model's forward catches them; where the model is given embeddings alone, the user
tells. What a pass has said is remembered with its output: activations that are computed again in the backward
pass (reentrant checkpointing) belong to that pass, whatever has been passed forward since.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grit_optim.lora.by_modality import missing_part
from grit_optim.lora.modality import AUDIO, TEXT, VISION, Modalities, find_modalities, parts_of
from grit_optim.lora.names import plain_name
from grit_optim.lora.site import Site
from grit_optim.messages import listed, warn
from grit_optim.options.declared import TOKEN_KINDS

_ID = re.compile(r"(image|video|audio)_token_(?:id|index)")
_OF_ID = {"image": VISION, "video": VISION, "audio": AUDIO}


class TokenKinds:
    """The kind of each token in the forward pass under way, as its place in :data:`TOKEN_KINDS`.

    Args:
        weights: the option ``modality_weights``.

    Attributes:
        current: the kinds ``[batch, tokens]`` of the latest pass with gradients; None where nobody says them.
        present: the kinds that the model has, as places in :data:`TOKEN_KINDS`.
        hooks: the handles of all hooks.
    """

    def __init__(self, weights: str | Mapping[str, float]) -> None:
        self._weights = weights
        self.current: Tensor | None = None
        self.present: tuple[int, ...] = tuple(range(len(TOKEN_KINDS)))
        self.hooks: list[RemovableHandle] = []
        self._told: Tensor | None = None
        self._open, self._is_told = 0, False
        self._warned = False

    def attach(self, model: nn.Module | None, sites: Sequence[Site]) -> None:
        """Watch the forward passes of ``model`` from now on. A copy of an optimizer does not know it.

        Raises:
            ValueError: the model has no tokens of several kinds, or one whose share is not given.
        """
        if model is None:
            return
        found = find_modalities(model)
        self._check(model, found, sites)
        modules = {plain_name(name): module for name, module in model.named_modules()}
        places: dict[str, dict[int, str]] = {"": {}}
        for whole in found.texts:
            ids = _ids(modules[whole].config)
            inside = [name for name in found.places if found.places[name] in (VISION, AUDIO)]
            for encoder in inside:  # PEFT calls `forward` of some of the modules around it, past their hooks
                parts = encoder.split(".")
                places |= {".".join(parts[:i]): ids for i in range(len(parts))}
        for name, ids in places.items():
            watch = Watch(self, ids)
            self.hooks.append(modules[name].register_forward_pre_hook(watch.begin, with_kwargs=True))
            self.hooks.append(modules[name].register_forward_hook(watch.end, always_call=True))

    def _check(self, model: nn.Module, found: Modalities, sites: Sequence[Site]) -> None:
        parts = {*found.encoded, *(site.modality for site in sites)}
        kinds = [kind for kind in TOKEN_KINDS if kind == TEXT or kind in parts]
        given = f"modality_weights={self._weights!r}"
        if len(kinds) == 1:
            raise ValueError(f"{given} tells kinds of tokens apart: {missing_part(model, VISION, parts)}")
        left = [k for k in kinds if not isinstance(self._weights, str) and k not in self._weights]
        if left:
            raise ValueError(
                f"{given} gives no share to {listed(left)}, which {type(model).__name__} has too. Give each "
                f"of {listed(kinds)} a share; 0 leaves a kind out"
            )
        self.present = tuple(TOKEN_KINDS.index(kind) for kind in kinds)

    def detach(self) -> None:
        """Remove the hooks."""
        while self.hooks:
            self.hooks.pop().remove()

    def tell(self, mask: Tensor) -> None:
        """Take the user's word for the coming forward pass: ``[batch, tokens]``, true for pictures' tokens.

        Raises:
            TypeError: it is no boolean tensor.
            ValueError: it has another number of dimensions.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                "observe_tokens() takes a boolean tensor [batch, tokens], true where a token stands for a "
                f"picture, as in input_ids == image_token_id, got {kind}"
            )
        if mask.dim() != 2:
            raise ValueError(
                "observe_tokens() takes a mask [batch, tokens] of the coming forward pass, got the shape "
                f"{list(mask.shape)}"
            )
        told = mask.detach().to(torch.int8) * TOKEN_KINDS.index(VISION)
        if self.hooks:
            self._told = told
        else:  # a copy does not know the model
            self.current = told

    def of(self, site: Site, output: Tensor) -> Tensor | int:
        """The kinds of the tokens of one call of a pair, ``[tokens]``, or one for all of them.

        Only the language model's pairs see several. Of a call that is no pass over all tokens, as of experts,
        nothing is known: its tokens count as text, and the user is told once.
        """
        if site.modality not in (TEXT, None):
            return TOKEN_KINDS.index(site.modality) if site.modality in TOKEN_KINDS else 0
        known, shape = self.current, output.shape[:-1]
        if known is not None and shape in (known.shape, (known.numel(),), (1, known.numel())):
            return known.reshape(-1)
        if not self._warned:
            self._warned = True
            seen = "nobody has said which" if known is None else f"the pass has {list(known.shape)} tokens"
            warn(
                f"modality_weights cannot tell the tokens of {site.name!r} apart: it was called on "
                f"{list(shape)} tokens, and {seen}. They count as text. Pass input_ids to the model, or call "
                "optimizer.observe_tokens(mask) before each forward pass"
            )
        return 0

    def begin(self, ids: Mapping[int, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass begins: take what its input says.

        Raises:
            ValueError: the mask that was told has another shape than the input.
        """
        self._open += 1
        if not torch.is_grad_enabled():
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        given = tokens if isinstance(tokens, Tensor) and tokens.dim() == 2 else None
        if self._open == 1:
            embeds = kwargs.get("inputs_embeds") if given is None else given
            self.current, self._told, told = self._told, None, self._told
            if told is not None and isinstance(embeds, Tensor) and embeds.shape[:2] != told.shape:
                self.current = None
                raise ValueError(
                    f"observe_tokens() was told a mask of shape {list(told.shape)}, and the model's input "
                    f"has {list(embeds.shape[:2])} tokens. Tell the mask of the coming forward pass, padding "
                    "and pictures included"
                )
            if told is not None:
                self._is_told = True
                return
            self._is_told = False
        if given is not None and not given.is_floating_point() and not self._is_told:
            self.current = _kinds(given, ids)

    def end(self, output: Any) -> None:
        """A forward pass ends; when its output gets gradients, its kinds are in force again."""
        self._open = max(0, self._open - 1)
        if self._open or not torch.is_grad_enabled() or self.current is None:
            return
        values = output.values() if isinstance(output, Mapping) else output
        for value in [values] if isinstance(values, Tensor) else values or ():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(_restore, weakref.ref(self), self.current))


class Watch:
    """Forward hooks of one module, which hold their owner weakly: no model keeps an optimizer alive."""

    def __init__(self, owner: TokenKinds | None, ids: Mapping[int, str]) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self._ids = dict(ids)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the owner what the pass is given."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            owner.begin(self._ids, args, kwargs)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Tell the owner that the pass is over."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            owner.end(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, (None, self._ids)


def _restore(owner: weakref.ref[TokenKinds], kinds: Tensor, gradient: Tensor) -> None:
    taps = owner()
    if taps is not None:
        taps.current = kinds


def _ids(config: Any) -> dict[int, str]:
    """The ids that stand for pictures and sound in a model's input, to their kind."""
    found: dict[int, str] = {}
    for name, value in getattr(config, "__dict__", {}).items():
        if (match := _ID.fullmatch(name)) and isinstance(value, int):
            found[value] = _OF_ID[match[1]]
    for part in parts_of(config).values():
        found = {**_ids(part), **found}
    return found


def _kinds(tokens: Tensor, ids: Mapping[int, str]) -> Tensor:
    """The kind of each token. Where the configuration names no id, negative ones stand for pictures."""
    kinds = torch.zeros(tokens.shape, dtype=torch.int8, device=tokens.device)
    if not ids:
        return kinds.masked_fill_(tokens < 0, TOKEN_KINDS.index(VISION))
    for token, kind in ids.items():
        kinds.masked_fill_(tokens == token, TOKEN_KINDS.index(kind))
    return kinds
