"""Tiny random models of pictures and text, of transformers' own classes, and batches for them."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

VOCABULARY, IMAGE, VIDEO, START, END, AUDIO = 64, 60, 61, 62, 63, 59
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 20,
    "out_hidden_size": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_MROPE = {"mrope_section": [1, 1, 2], "rope_type": "default"}
_AUDIO = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "input_size": 8,
    "ext_pw_out_channel": 12,
    "nemo_conv_channels": 12,
    "depthwise_separable_out_channel": 12,
    "audio_token_id": AUDIO,
    "left_chunk": 2,
    "chunk_size": -1,
}


def _text(kind=None, **more):
    return {**({"model_type": kind} if kind else {}), **_TEXT, **more}


def _vision(kind=None, **more):
    return {**({"model_type": kind} if kind else {}), **_VISION, **more}


# Per model: its classes' name, what its configuration is given, image tokens of one picture, and how a
# picture is given.
MODELS = {
    "llava": ("Llava", {"vision_config": _vision("clip_vision_model", projection_dim=12),
                        "text_config": _text("llama"), "image_token_index": IMAGE,
                        "vision_feature_layer": -1}, 4, "pixels"),
    "qwen2.5-vl": ("Qwen2_5_VL", {"vision_config": {**_QWEN_VISION, "window_size": 16,
                                                    "fullatt_block_indexes": [1]},
                                  "text_config": _text(rope_scaling={**_MROPE, "type": "mrope"}),
                                  **_QWEN_IDS}, 1, "patches"),
    "qwen3-vl": ("Qwen3VL", {"vision_config": {**_QWEN_VISION, "num_position_embeddings": 16,
                                               "deepstack_visual_indexes": [0]},
                             "text_config": _text(rope_scaling={**_MROPE, "mrope_interleaved": True}),
                             **_QWEN_IDS}, 1, "patches"),
    "idefics3": ("Idefics3", {"vision_config": _vision(), "text_config": _text("llama"),
                              "image_token_id": IMAGE, "scale_factor": 2}, 1, "tiles"),
    "smolvlm": ("SmolVLM", {"vision_config": _vision(), "text_config": _text("llama"),
                            "image_token_id": IMAGE, "scale_factor": 2}, 1, "tiles"),
    "paligemma": ("PaliGemma", {"vision_config": _vision("siglip_vision_model"),
                                "text_config": _text("gemma"), "image_token_index": IMAGE,
                                "projection_dim": 16, "hidden_size": 16}, 4, "pixels"),
    "gemma3": ("Gemma3", {"vision_config": _vision("siglip_vision_model"),
                          "text_config": _text("gemma3_text", sliding_window=16),
                          "image_token_index": IMAGE, "mm_tokens_per_image": 1}, 1, "pixels"),
    "internvl": ("InternVL", {"vision_config": _vision(image_size=[8, 8], patch_size=[4, 4]),
                              "text_config": _text("qwen2"), "image_token_id": IMAGE,
                              "downsample_ratio": 0.5}, 1, "pixels"),
    "mllama": ("Mllama", {"vision_config": {"hidden_size": 12, "intermediate_size": 20,
                                            "num_hidden_layers": 2, "num_global_layers": 1,
                                            "attention_heads": 2, "image_size": 8, "patch_size": 4,
                                            "max_num_tiles": 1, "vision_output_dim": 24,
                                            "intermediate_layers_indices": [0],
                                            "supported_aspect_ratios": [[1, 1]]},
                          "text_config": _text(num_hidden_layers=3, cross_attention_layers=[1],
                                               rope_scaling={"rope_type": "default"}),
                          "image_token_index": IMAGE}, 1, "crossing"),
    "phi4-multimodal": ("Phi4Multimodal", {**_text(), "original_max_position_embeddings": 64,
                                           "partial_rotary_factor": 1.0, "audio_config": _AUDIO,
                                           "vision_config": _vision(crop_size=8, feature_layer=-1,
                                                                    image_token_id=IMAGE)},
                        5, "crops"),
}  # fmt: skip


def plain(name="llava", seed=0, **more):
    """The model without an adapter."""
    torch.manual_seed(seed)
    kind, settings, *_ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**settings, **more})
    family = "ForCausalLM" if kind == "Phi4Multimodal" else "ForConditionalGeneration"
    model = getattr(transformers, f"{kind}{family}")(config)
    for key, parameter in model.named_parameters():  # some start at zero, and let nothing through
        last = key.rsplit(".", 1)[-1]
        if "_gate" in last or last in ("gate", "mm_input_projection_weight"):
            torch.nn.init.normal_(parameter, 0.3, 0.1)
    return model


def adapted(name="llava", rank=4, seed=0, targets="all-linear", **more):
    """The model with LoRA on all linear layers, B drawn at random so that every gradient is there at once."""
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model = get_peft_model(plain(name, seed, **more), lora)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.3)
    return model


def batch(name="llava", seed=0, pictures=(1, 2), length=12):
    """A batch with so many pictures in each row, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    _, _, count, way = MODELS[name]
    ids = torch.randint(3, 50, (len(pictures), length + max(pictures) * (count + 2)), generator=generator)
    mask = torch.ones_like(ids)
    for row, number in enumerate(pictures):
        run = [START, *[IMAGE] * count, END] if "qwen" in name else [4, *[IMAGE] * count, 5]
        ids[row, 1 : 1 + number * len(run)] = torch.tensor(run * number)
        end = length + number * len(run)
        ids[row, end:], mask[row, end:] = 0, 0
    labels = ids.masked_fill((mask == 0) | (ids >= AUDIO), -100)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    total = sum(pictures)
    pixels = torch.randn(max(total, 1), 3, 8, 8, generator=generator)
    if name in ("gemma3", "paligemma"):
        given["token_type_ids"] = (ids == IMAGE).long()
    return {**given, **(_pictures(way, pixels, pictures, ids) if total else {})}


def _pictures(way, pixels, pictures, ids):
    """The arguments that hold the pictures."""
    total = sum(pictures)
    if way == "pixels":
        return {"pixel_values": pixels}
    if way == "patches":
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(total * 4, -1)
        return {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 2, 2]] * total),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    if way == "tiles":  # as many places in each row; empty ones are zero, and left out
        places = torch.zeros(len(pictures), max(pictures), 3, 8, 8)
        for row, some in enumerate(pixels.split(pictures)):
            places[row, : len(some)] = some
        return {"pixel_values": places}
    if way == "crops":
        return {
            "image_pixel_values": torch.stack((pixels, -pixels), 1),
            "image_sizes": torch.tensor([[8, 8]] * total),
            "image_attention_mask": torch.ones(total, 2, 2, 2),
        }
    places = torch.zeros(len(pictures), max(pictures), 1, 3, 8, 8)
    there = torch.zeros(len(pictures), ids.shape[1], max(pictures), 1, dtype=torch.long)
    for row, some in enumerate(pixels.split(pictures)):
        places[row, : len(some), 0] = some
        there[row, 2:, : len(some)] = 1
    return {
        "pixel_values": places,
        "aspect_ratio_ids": torch.ones(len(pictures), max(pictures), dtype=torch.long),
        "aspect_ratio_mask": torch.ones(len(pictures), max(pictures), 1, dtype=torch.long),
        "cross_attention_mask": there,
    }


def processor():
    """A processor for the tiny Llava: words w0, w1, …, two roles, and pictures of 8 × 8."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
        *(f"w{i}" for i in range(54)),
        "user",
        "assistant",
        "<image>",
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return transformers.LlavaProcessor(
        image_processor=getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
