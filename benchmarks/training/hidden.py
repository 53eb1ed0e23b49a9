"""What frozen layers give for an example, computed once and kept in memory-mapped files.

Where only the last decoder layers have adapters, those below give the same hidden states at every step of
every run. Each example has a file of its own, named by a hash of its tokens, in a folder named by a hash of
the model, the number of layers and the precision. An example is computed alone, without padding, so that no
value depends on the batch that first needed it. Several processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from tqdm import tqdm

from ..core.files import BenchmarkError, locked, sha256, write_with
from ..tasks.objective import Batch, collate
from ..tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1  # raise it with every change of what the files hold
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest hidden state: rounding


class Skipped(torch.nn.Module):
    """Stands in the place of a decoder layer and gives back what it is given."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):  # what some decoders ask their layers for
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The hidden states as they are."""
        return hidden_states


class Stem:
    """The decoder layers below the adapted ones, taken out of a model in whose place they are skipped.

    The model then takes the stem's hidden states as `inputs_embeds`. Layers keep their numbers, so that
    adapters have the names that they would have in the whole model.
    """

    def __init__(self, model: PreTrainedModel, adapted: int) -> None:
        """Split a model so that its last `adapted` layers stay.

        Raises:
            BenchmarkError: The model has fewer layers, or keeps them where nobody finds them.
        """
        self.decoder: Any = model.get_decoder()
        layers = getattr(self.decoder, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList):
            raise BenchmarkError(
                f"--adapted-layers: {type(self.decoder).__name__} has no list of decoder layers named "
                "`layers`; leave the option out to adapt all of them"
            )
        self.count = len(layers) - adapted
        if self.count < 0:
            raise BenchmarkError(f"--adapted-layers {adapted}: the base model has {len(layers)} layers")
        below, above = layers[: self.count], layers[self.count :]
        self.layers = torch.nn.ModuleList([*below, *map(Skipped, above)])
        self.decoder.layers = torch.nn.ModuleList([*map(Skipped, below), *above])

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, positions, width] of tokens [1, positions] before the first adapted layer."""
        found: list[torch.Tensor] = []
        hook = self.layers[self.count - 1].register_forward_hook(lambda *given: found.append(given[-1]))
        above, was_training = self.decoder.layers, self.decoder.training
        self.decoder.layers = self.layers
        self.decoder.eval()
        try:
            self.decoder(input_ids=tokens, use_cache=False)
        finally:
            hook.remove()
            self.decoder.train(was_training)
            self.decoder.layers = above
        return found[0]

    @torch.no_grad()
    def check(self, tokens: torch.Tensor) -> None:
        """Refuse a model that gives something else from the stem's hidden states than from the tokens.

        Raises:
            BenchmarkError: Such as one that scales what it takes for embeddings, or adds positions to it.
        """
        hidden = self(tokens)
        above = self.decoder.layers
        split = self.decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
        self.decoder.layers = torch.nn.ModuleList([*self.layers[: self.count], *above[self.count :]])
        try:
            whole = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            self.decoder.layers = above
        if float((split - whole).abs().max()) > _CLOSE[hidden.dtype] * float(whole.abs().max()):
            raise BenchmarkError(
                f"--adapted-layers: {type(self.decoder).__name__} does not take hidden states in place of "
                "embeddings as they are; leave the option out to adapt all layers"
            )


@dataclass
class HiddenStates:
    """The files of one stem, and batches with what they hold.

    Attributes:
        precision: makes the context of the stem's forward passes.
    """

    stem: Stem
    folder: Path
    device: str
    precision: Callable[[], AbstractContextManager[Any]]

    def prepare(self, examples: Iterable[Example]) -> None:
        """Compute what no file holds yet, under a progress bar; another process's work is waited for."""
        unique = dict.fromkeys(examples)
        with self.precision():
            self.stem.check(self._tokens(min(unique, key=len)))
        missing = [example for example in unique if not self._path(example).exists()]
        with tqdm(total=len(missing), desc="hidden states", unit="example", disable=not missing) as bar:
            for wait in (False, True):
                missing = [example for example in missing if not self._make(example, wait, bar.update)]

    def _make(self, example: Example, wait: bool, tell: Callable[[], object]) -> bool:
        """See to an example's file; False where another process is at it and is not to be waited for."""
        path = self._path(example)
        with locked(self.folder / "claims", int(path.stem[:15], 16), wait) as mine:
            if mine and not path.exists():
                self._compute(example)
        if mine:
            tell()
        return mine

    def _tokens(self, example: Example) -> torch.Tensor:
        return torch.tensor([(*example.prompt, *example.answer[:-1])], device=self.device)

    def _path(self, example: Example) -> Path:
        name = sha256([",".join(map(str, (*example.prompt, *example.answer[:-1])))])[:32]
        return self.folder / name[:2] / f"{name}.npy"

    def _compute(self, example: Example) -> numpy.ndarray[Any, Any]:
        """Compute and keep an example's hidden states, fp32 [positions, width]."""
        with self.precision():
            made = self.stem(self._tokens(example))[0].float().cpu().numpy()

        def write(temporary: Path) -> None:
            """Save the array under exactly this name."""
            with temporary.open("wb") as file:
                numpy.save(file, made)

        write_with(self._path(example), write)
        return made

    def _read(self, example: Example) -> numpy.ndarray[Any, Any]:
        """An example's hidden states from its file, which is made where it is missing or damaged."""
        try:
            found = numpy.load(self._path(example), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return self._compute(example)
        return found if len(found) == len(example) - 1 else self._compute(example)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The examples side by side, with the hidden states of all tokens that are no padding."""
        batch = collate(examples)
        states = [torch.from_numpy(numpy.array(self._read(example))) for example in examples]
        return replace(batch, hidden=torch.nn.utils.rnn.pad_sequence(states, batch_first=True))


def folder_of(root: Path, model: str, stem: Stem, precision: str) -> Path:
    """The folder of a stem's files: `model` is the fingerprint of the whole base model."""
    return root / "hidden" / sha256([str(FORMAT), model, str(stem.count), precision])[:32]
