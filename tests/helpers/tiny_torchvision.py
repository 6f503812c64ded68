"""Tiny random models of families whose processors need torchvision; see `tiny_any`. Without it, none of them loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tiny_any import ANY, CELLS, CHATML, PIXELS, TEXT, VISION, WINDOW, Tiny, mrope, randomize, text_config, write_any
from transformers.utils import is_torchvision_available

_Token = Callable[[str], int]


def _smolvlm(token: _Token, size: int) -> Any:
    return transformers.SmolVLMConfig(
        text_config=text_config("LlamaConfig", size).to_dict(),
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        image_token_id=token("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def _mistral3(token: _Token, size: int) -> Any:
    return transformers.Mistral3Config(
        text_config=text_config("MistralConfig", size, sliding_window=None, head_dim=16).to_dict(),
        vision_config={"model_type": "pixtral", **VISION, "image_size": 112, "patch_size": 14},
        image_token_index=token("[IMG]"),
        spatial_merge_size=2,
    )


def _lfm2_vl(token: _Token, size: int) -> Any:
    layers = ["conv", "full_attention", "conv"]
    return transformers.Lfm2VlConfig(
        text_config=text_config("Lfm2Config", size, num_hidden_layers=3, layer_types=layers).to_dict(),
        vision_config={"model_type": "siglip2_vision_model", **VISION, "patch_size": 14, "num_patches": 64},
        image_token_id=token("<image>"),
        projector_hidden_size=32,
    )


def _gemma4(token: _Token, size: int) -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    more = {
        "head_dim": 16,
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": layers,
        "sliding_window": WINDOW,
    }
    more |= {"vocab_size_per_layer_input": size, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 8, "pooling_kernel_size": 2}
    return transformers.Gemma4Config(
        text_config=text_config("Gemma4TextConfig", size, **more, use_bidirectional_attention="vision").to_dict(),
        vision_config={**vision, "position_embedding_size": 256},
        audio_config=None,
        boi_token_id=token("<|image>"),
        eoi_token_id=token("<image|>"),
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        boa_token_id=token("<|audio>"),
        eoa_token_index=token("<audio|>"),
        audio_token_id=token("<|audio|>"),
    )


def _molmo2(token: _Token, size: int) -> Any:
    text = {**TEXT, "head_dim": 16, "vocab_size": size - 128, "additional_vocab_size": 128}
    return transformers.Molmo2Config(
        text_config=text,
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 16, "image_size": [56, 56], "patch_size": 14}
        | {"num_position_embeddings": 16},
        adapter_config={"vision_feature_layer": [-1], "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
        | {"num_key_value_heads": 2, "intermediate_size": 64, "text_hidden_size": 32},
        image_start_token_id=token("<im_start>"),
        low_res_image_start_token_id=token("<low_res_im_start>"),
        image_end_token_id=token("<im_end>"),
        image_patch_id=token("<im_patch>"),
        frame_start_token_id=token("<frame_start>"),
        frame_end_token_id=token("<frame_end>"),
    )


def _minicpm(token: _Token, size: int) -> Any:
    text = ANY["qwen3_5"].config(lambda _: 0, size).text_config.to_dict()
    return transformers.MiniCPMV4_6Config(
        text_config={
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
        vision_config={**VISION, "image_size": 112, "patch_size": 14, "insert_layer_id": 1},
        insert_layer_id=1,
        image_size=112,
        image_token_id=token("<image_pad>"),
        video_token_id=token("<video_pad>"),
    )


def _omni(token: _Token, size: int) -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    audio = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32, "output_dim": 32}
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "vocab_size": size, "rope_parameters": mrope([2, 3, 3])},
        vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 56},
        audio_config={**audio, "num_mel_bins": 16, "n_window": 4},
        audio_token_index=token("<|AUDIO|>"),
        image_token_index=token("<|IMAGE|>"),
        video_token_index=token("<|VIDEO|>"),
        audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"),
        vision_start_token_id=token("<|vision_bos|>"),
        vision_end_token_id=token("<|vision_eos|>"),
    )


def write_omni(directory: Path, seed: int = 0) -> Path:
    """Write a whole Qwen2.5-Omni with its parts that speak, as the hub has it, and return the directory."""
    tiny = TORCHVISION["qwen2_5_omni_thinker"]
    write_any("qwen2_5_omni_thinker", directory, tiny, seed)
    thinker = transformers.AutoConfig.from_pretrained(directory)
    ids = {f"tts_codec_{name}_token_id": 0 for name in ("start", "end", "pad", "mask")}
    ids |= {f"{name}_token_id": 0 for name in ("vision_start", "vision_end", "audio_start", "audio_end")}
    talker = {
        **TEXT,
        **ids,
        "embedding_size": 32,
        "head_dim": 16,
        "vocab_size": 64,
        "rope_parameters": mrope([2, 3, 3]),
    }
    speaker = {"enc_channels": [8, 8, 8, 8, 24], "enc_attention_channels": 8, "enc_res2net_scale": 2, "enc_dim": 8}
    dit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 1, "emb_dim": 8}
    dit |= {"head_dim": 8, "num_embeds": 16, "mel_dim": 8, "enc_emb_dim": 8, "enc_se_channels": 8, **speaker}
    vocoder = {"mel_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
    vocoder |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]]}
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker.to_dict(),
        talker_config=talker,
        token2wav_config={"dit_config": dit, "bigvgan_config": vocoder},
    )
    model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(directory)
    return directory


_SQUARE = {"height": 56, "width": 56}
_MOLMO = (
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
)
_SMOL = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
_MINI = {"patch_size": 14, "scale_resolution": 112, "max_slice_nums": 4, "downsample_mode": "16x"}

TORCHVISION = {
    "smolvlm": Tiny(
        "SmolVLMForConditionalGeneration",
        _smolvlm,
        ("<fake_token_around_image>", "<image>", "<video>", "<end_of_utterance>", "<global-img>", *CELLS),
        bos="<|begin_of_text|>",
        template="idefics3",
        images={"image_processor_type": "SmolVLMImageProcessor", **_SMOL},
        videos={"video_processor_type": "SmolVLMVideoProcessor", **_SMOL},
        processor={"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
    ),
    "mistral3": Tiny(
        "Mistral3ForConditionalGeneration",
        _mistral3,
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        bos="<s>",
        images={
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 112},
            "patch_size": {"height": 14, "width": 14},
        },
        processor={"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2},
    ),
    "lfm2_vl": Tiny(
        "Lfm2VlForConditionalGeneration",
        _lfm2_vl,
        CHATML,
        {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        bos="<|startoftext|>",
        images={
            "image_processor_type": "Lfm2VlImageProcessor",
            "tile_size": 112,
            "size": {"height": 112, "width": 112},
            "encoder_patch_size": 14,
            "min_image_tokens": 1,
            "max_image_tokens": 16,
            "max_tiles": 4,
        },
        processor={"processor_class": "Lfm2VlProcessor"},
    ),
    "gemma4": Tiny(
        "Gemma4ForConditionalGeneration",
        _gemma4,
        ("<|turn>", "<turn|>", "<|video|>"),
        {
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "audio_token": "<|audio|>",
        },
        bos="<bos>",
        images={
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "max_soft_tokens": 70,
        },
        videos={"video_processor_type": "Gemma4VideoProcessor", "patch_size": 8, "pooling_kernel_size": 2},
        sounds={"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        processor={"processor_class": "Gemma4Processor", "image_seq_length": 70},
    ),
    "molmo2": Tiny(
        "Molmo2ForConditionalGeneration",
        _molmo2,
        (*CHATML, "<|image|>", "<|video|>", *_MOLMO),
        images={
            "image_processor_type": "Molmo2ImageProcessor",
            "size": _SQUARE,
            "max_crops": 4,
            "overlap_margins": [1, 1],
            "patch_size": 14,
        },
        videos={"video_processor_type": "Molmo2VideoProcessor", "size": _SQUARE},
        processor={"processor_class": "Molmo2Processor"},
    ),
    "minicpmv4_6": Tiny(
        "MiniCPMV4_6ForConditionalGeneration",
        _minicpm,
        (*CHATML, "<think>", "</think>"),
        {
            "image_token": "<image_pad>",
            "video_token": "<video_pad>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
        images={"image_processor_type": "MiniCPMV4_6ImageProcessor", **_MINI},
        videos={"video_processor_type": "MiniCPMV4_6VideoProcessor", **_MINI},
        processor={"processor_class": "MiniCPMV4_6Processor"},
    ),
    "qwen2_5_omni_thinker": Tiny(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _omni,
        CHATML,
        {
            "image_token": "<|IMAGE|>",
            "audio_token": "<|AUDIO|>",
            "video_token": "<|VIDEO|>",
            "vision_bos_token": "<|vision_bos|>",
            "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
        images={"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "size": PIXELS},
        videos={"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14, "merge_size": 2},
        sounds={"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16},
        processor={"processor_class": "Qwen2_5OmniProcessor"},
    ),
}
LOADABLE = {**ANY, **(TORCHVISION if is_torchvision_available() else {})}
"""All families that load with the packages that are installed."""
