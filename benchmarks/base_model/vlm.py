"""The embedded vision-language model: a small vision transformer, a projector, and the embedded Llama."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .icons import PIXELS, WHITE
from .load import ANSWER, BLANK, SPECIAL_TOKENS, load_base_model, model_config, read_model
from .load import FOLDER as TEXT_FOLDER

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

FOLDER = Path(__file__).resolve().parent / "llava"
PATCH = 8  # pixels
PICTURE_TOKENS = (PIXELS // PATCH) ** 2
# The embedded vocabulary has no token for pictures. No text that the decoder reads here has a blank.
PICTURE = SPECIAL_TOKENS.index(BLANK)
PROMPT = (*[PICTURE] * PICTURE_TOKENS, SPECIAL_TOKENS.index(ANSWER))
_REMEDY = "make it with: python -m benchmarks pretrain --model vlm --out benchmarks/base_model/llava"


def vlm_config() -> LlavaConfig:
    """LLaVA: a SigLIP encoder of width 192 in 6 layers, and the embedded Llama; about 5.6 M parameters."""
    from transformers import LlavaConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=PIXELS,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=model_config(),
        image_token_index=PICTURE,
        image_seq_length=PICTURE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",  # SigLIP has no class token that would be left out
        tie_word_embeddings=True,
    )


def untrained_vlm() -> LlavaForConditionalGeneration:
    """The pretrained Llama with an encoder and a projector drawn from torch's generator."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(vlm_config(), attn_implementation="eager")
    model.model.language_model.load_state_dict(load_base_model()[0].model.state_dict())
    return model


def load_vlm(folder: Path = FOLDER) -> LlavaForConditionalGeneration:
    """The pretrained model, in fp32, on the CPU, in eval mode."""
    from transformers import LlavaForConditionalGeneration

    return read_model(LlavaForConditionalGeneration, folder, "the base model that reads pictures", _REMEDY)


def embedded_model(reads_pictures: bool) -> PreTrainedModel:
    """The embedded base model that reads pictures, or the one of text alone; fp32, in eval mode."""
    return load_vlm() if reads_pictures else load_base_model()[0]


def embedded_weights(reads_pictures: bool) -> Path:
    """The file of that model's weights."""
    return (FOLDER if reads_pictures else TEXT_FOLDER) / "model.safetensors"


def pixel_values(pictures: Sequence[bytes] | torch.Tensor) -> torch.Tensor:
    """What the model reads: float32 [pictures, 3, PIXELS, PIXELS] in [−1, 1], three equal channels.

    Args:
        pictures: each of PIXELS × PIXELS bytes, or uint8 [pictures, PIXELS, PIXELS].
    """
    if not isinstance(pictures, torch.Tensor):
        pictures = torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8)
    gray = pictures.view(-1, 1, PIXELS, PIXELS).float() * (2 / WHITE) - 1
    return gray.expand(-1, 3, -1, -1)
