"""Tiny random models of families that are not known by hand, in the hub's layout: real classes, a few thousand weights.

`write_any(name, directory)` writes `config.json`, safetensors, a tokenizer, the processor's settings and
`chat_template.jinja`. The chat templates in `tiny_templates/` are small ones of our own in each family's format.
All families of `MULTIMODAL` and `TEXT_ONLY` load without torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import _randomize as randomize
from tiny_tokenizers import byte_level

TEMPLATES = Path(__file__).parent / "tiny_templates"

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CHATML = ("<|im_start|>", "<|im_end|>")
WINDOW = 24
"""Tokens that a layer with a sliding window attends to: fewer than the prompt has."""


@dataclass(frozen=True)
class Tiny:
    """One family.

    Attributes:
        model: The name of the generative class in transformers.
        config: Returns the configuration; its arguments are the id of a token by its text, and the vocabulary's size.
        specials: Special tokens beside those in `named`.
        named: Special tokens that the processor asks its tokenizer for by name.
        bos: The token at the beginning of every text, if there is one.
        template: The file in `tiny_templates/`.
        images: Settings of the image processor, with its class; empty for a model of text alone.
        videos: Settings of the video processor, where the processor does not load without it.
        sounds: Settings of the feature extractor of sounds, likewise.
        processor: Settings of the processor, with its class.
    """

    model: str
    config: Callable[[Callable[[str], int], int], Any]
    specials: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    bos: str | None = None
    template: str = ""
    images: dict[str, Any] = field(default_factory=dict)
    videos: dict[str, Any] = field(default_factory=dict)
    sounds: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)


def write_any(name: str, directory: Path, tiny: Tiny | None = None, seed: int = 0) -> Path:
    """Write a tiny random model of a family, with its processor, and return the directory.

    Args:
        name: The name of its template, unless the record names one.
        directory: Where the files go.
        tiny: The record; `None` takes that of `ANY`.
        seed: Of the weights.
    """
    tiny = tiny or ANY[name]
    torch.manual_seed(seed)
    tokenizer = byte_level([*tiny.specials, *tiny.named.values()], tiny.named, tiny.bos)
    size = -(-len(tokenizer) // 8) * 8
    model = getattr(transformers, tiny.model)(tiny.config(tokenizer.convert_tokens_to_ids, size))
    randomize(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text((TEMPLATES / f"{tiny.template or name}.jinja").read_text())
    if tiny.images:
        cls = tiny.processor["processor_class"]
        settings = {**tiny.images, **tiny.sounds, "processor_class": cls}
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
        if tiny.videos:
            (directory / "video_preprocessor_config.json").write_text(json.dumps(tiny.videos))
        (directory / "processor_config.json").write_text(json.dumps(tiny.processor))
    return directory


def text_config(kind: str, vocab_size: int, **more: Any) -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return getattr(transformers, kind)(**{**TEXT, **ids, "vocab_size": vocab_size, **more})


def mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}


def _qwen3_5(token: Callable[[str], int], size: int) -> Any:
    text = {
        "num_hidden_layers": 4,  # three with a recurrent state, one with attention
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": mrope([1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.25),
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16}
    return transformers.Qwen3_5Config(
        text_config={**TEXT, **text, "vocab_size": size},
        vision_config={**vision, "out_hidden_size": 32, "num_position_embeddings": 64},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def _gemma3(token: Callable[[str], int], size: int) -> Any:
    return transformers.Gemma3Config(
        text_config=_gemma3_text(token, size).to_dict(),
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
    )


def _gemma3_text(_: Callable[[str], int], size: int) -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    more = {"head_dim": 16, "num_hidden_layers": 3, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
    return text_config("Gemma3TextConfig", size, **more, layer_types=layers)


def _glm4v(token: Callable[[str], int], size: int) -> Any:
    text = {**TEXT, "vocab_size": size, "pad_token_id": 0}
    text["rope_parameters"] = mrope([2, 1, 1], partial_rotary_factor=0.5)
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    return transformers.Glm4vConfig(
        text_config=text,
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
    )


def _idefics3(token: Callable[[str], int], size: int) -> Any:
    return transformers.Idefics3Config(
        text_config=text_config("LlamaConfig", size).to_dict(),
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        image_token_id=token("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def _internvl(token: Callable[[str], int], size: int) -> Any:
    return transformers.InternVLConfig(
        text_config=text_config("Qwen2Config", size).to_dict(),
        vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=token("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def _llava(token: Callable[[str], int], size: int) -> Any:
    clip = {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 3, "projection_dim": 32}
    return transformers.LlavaConfig(
        text_config=text_config("LlamaConfig", size).to_dict(),
        vision_config={**clip, "image_size": 56, "patch_size": 14},
        image_token_index=token("<image>"),
        image_seq_length=16,
    )


PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112]]


def _llava_onevision(token: Callable[[str], int], size: int) -> Any:
    siglip = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
    return transformers.LlavaOnevisionConfig(
        text_config=text_config("Qwen2Config", size).to_dict(),
        vision_config={**siglip, "image_size": 56, "patch_size": 14},
        image_token_index=token("<image>"),
        video_token_index=token("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


OVIS_TOKENS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def _ovis2(token: Callable[[str], int], size: int) -> Any:
    return transformers.Ovis2Config(
        text_config=text_config("Qwen2Config", size).to_dict(),
        vision_config={**VISION, "image_size": 56, "patch_size": 14, "hidden_stride": 2, "vocab_size": 64},
        image_token_id=token("<IMG_ATOM>"),
        visual_indicator_token_ids=[token(text) for text in OVIS_TOKENS],
        vocab_size=size,
        hidden_size=32,
    )


def _aya_vision(token: Callable[[str], int], size: int) -> Any:
    layers = ["sliding_attention", "full_attention"]
    siglip = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
    return transformers.AyaVisionConfig(
        text_config=text_config("Cohere2Config", size, sliding_window=WINDOW, layer_types=layers).to_dict(),
        vision_config={**siglip, "image_size": 56, "patch_size": 14},
        image_token_index=token("<|IMG_PATCH|>"),
    )


def _llama(_: Callable[[str], int], size: int) -> Any:
    return text_config("LlamaConfig", size)


def _qwen3(_: Callable[[str], int], size: int) -> Any:
    return text_config("Qwen3Config", size, head_dim=16)


PIXELS = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 36}
_SQUARE = {"height": 56, "width": 56}
_TILES = {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
_QWEN_IMAGE = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>")
_GLM += ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
_AYA = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
_AYA += ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL")
CELLS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_AYA += tuple(f"TILE_{number}" for number in range(1, 5))

MULTIMODAL = {
    "qwen3_5": Tiny(
        "Qwen3_5ForConditionalGeneration",
        _qwen3_5,
        (*CHATML, *_QWEN_IMAGE, "<think>", "</think>"),
        images={"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2, "size": PIXELS},
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
    "gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        _gemma3,
        ("<start_of_turn>", "<end_of_turn>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "<bos>",
        images={"image_processor_type": "Gemma3ImageProcessor", "size": _SQUARE},
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 4},
    ),
    "glm4v": Tiny(
        "Glm4vForConditionalGeneration",
        _glm4v,
        _GLM,
        images={"image_processor_type": "Glm4vImageProcessor", "size": PIXELS},
        processor={"processor_class": "Glm4vProcessor"},
    ),
    "idefics3": Tiny(
        "Idefics3ForConditionalGeneration",
        _idefics3,
        ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *CELLS),
        bos="<|begin_of_text|>",
        images={
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 112},
            "max_image_size": {"longest_edge": 56},
        },
        processor={"processor_class": "Idefics3Processor", "image_seq_len": 4},
    ),
    "internvl": Tiny(
        "InternVLForConditionalGeneration",
        _internvl,
        CHATML,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        images={"image_processor_type": "GotOcr2ImageProcessor", **_TILES},
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 4},
    ),
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        _llava,
        ("<image>",),
        bos="<s>",
        images={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": _SQUARE,
        },
        processor={
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    ),
    "llava_onevision": Tiny(
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision,
        (*CHATML, "<image>", "<video>"),
        images={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": _SQUARE,
            "image_grid_pinpoints": PINPOINTS,
        },
        processor={
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
        },
    ),
    "ovis2": Tiny(
        "Ovis2ForConditionalGeneration",
        _ovis2,
        (*CHATML, "<image>", "<IMG_ATOM>", *OVIS_TOKENS),
        images={"image_processor_type": "Ovis2ImageProcessor", **_TILES},
        processor={"processor_class": "Ovis2Processor", "image_seq_length": 4},
    ),
    "aya_vision": Tiny(
        "AyaVisionForConditionalGeneration",
        _aya_vision,
        _AYA,
        bos="<BOS_TOKEN>",
        images={"image_processor_type": "GotOcr2ImageProcessor", **_TILES},
        processor={"processor_class": "AyaVisionProcessor", "img_size": 56, "patch_size": 14, "downsample_factor": 2},
    ),
}
TEXT_ONLY = {
    "llama": Tiny(
        "LlamaForCausalLM",
        _llama,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "qwen3": Tiny("Qwen3ForCausalLM", _qwen3, (*CHATML, "<think>", "</think>")),
    "gemma3_text": Tiny(
        "Gemma3ForCausalLM",
        _gemma3_text,
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        template="gemma3",
    ),
}
ANY: dict[str, Tiny] = {**MULTIMODAL, **TEXT_ONLY}
