"""Tiny random models of every family, written in exactly the hub's layout: real classes, a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_phi3v import write_phi3v
from tiny_tokenizers import PAPER
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gen2embed_mteb.mini import model_dir

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next")

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_PIXELS = {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}}


def write_tiny(family: str, directory: Path, seed: int = 0) -> Path:
    """Write a tiny random model of a family, with its processor, and return the directory."""
    torch.manual_seed(seed)
    if family == "phi3_v":
        return write_phi3v(directory, seed=seed)
    (_write_llava if family == "llava_next" else _write_qwen)(family, directory)
    return directory


def _randomize(model: torch.nn.Module) -> None:
    """Weights large enough that layers, images and positions visibly matter (HF's init of 0.02 hides them)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)


def _write_qwen(family: str, directory: Path) -> None:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir())
    token = tokenizer.convert_tokens_to_ids
    text = {**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": dict(_MROPE)}
    text |= {"bos_token_id": None, "eos_token_id": token("<|im_end|>")}
    patch = 16 if family == "qwen3_vl" else 14
    if family == "qwen3_vl":
        text["head_dim"] = 16
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": patch}
        vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        names = ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor")
    elif family == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        names = ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor")
    else:
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        names = ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor")
    config = getattr(transformers, names[0])(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = getattr(transformers, names[1])(config)
    _randomize(model)
    model.save_pretrained(directory)
    tokenizer.chat_template = None
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(directory)
    settings = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, **_PIXELS).to_dict()
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": names[2]}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def _write_llava(_: str, directory: Path) -> None:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = _llama_tokenizer()
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(
        text_config=MistralConfig(**_TEXT, vocab_size=len(tokenizer), sliding_window=None),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            projection_dim=32,
        ),
        image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaNextForConditionalGeneration(config)
    _randomize(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    ).to_dict()
    images |= {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {"processor_class": "LlavaNextProcessor", "patch_size": 14, "vision_feature_select_strategy": "default"}
    processor |= {"image_token": "<image>", "num_additional_image_tokens": 1}
    (directory / "processor_config.json").write_text(json.dumps(processor))


def _llama_tokenizer():
    """A Llama-style BPE: spaces as U+2581, byte fall-back, `<s>` in front."""
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [text for prompt in PAPER for text in (prompt.query_system, prompt.query_text, "a b c d")]
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=pieces, show_progress=False))
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.model_max_length = 4096
    return tokenizer
