"""A tiny random Phi-3.5-V in exactly the hub's layout, with a tokenizer that has the real ids of control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

HIDDEN, HEADS, LAYERS, TOWER = 16, 2, 2, 32
NAMED = {0: "<|endoftext|>", 1: "<|assistant|>", 6: "<|system|>", 7: "<|end|>", 10: "<|user|>", 44: "<|image|>"}
PIECES = {29871: "▁", 29900: "a", 29901: ":"}


def write_phi3v(directory: Path, *, original_max: int = 4096, seed: int = 0, **changes: Any) -> Path:
    """Write the model, and return the directory.

    Args:
        directory: Where to.
        original_max: The most tokens for which the short factors of positions hold.
        seed: Of the weights.
        changes: Further keys of `config.json`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "auto_map": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp"}
        | {"use_hd_transform": True, "with_learnable_separator": True},
        "img_processor": {"image_dim_out": TOWER, "name": "clip_vision_model", "num_img_tokens": 144},
        **{"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS},
        **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": 32064},
        **{"max_position_embeddings": 131072, "original_max_position_embeddings": original_max},
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.2, 1.7, 2.5], "long_factor": [1.0, 3.0, 15.0, 60.0]},
        **{"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "sliding_window": 262144, "torch_dtype": "float32"},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000, "tie_word_embeddings": False},
        "vision_config": {"hidden_size": TOWER, "intermediate_size": 2 * TOWER, "num_hidden_layers": 3}
        | {"num_attention_heads": 4},
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    processor = {
        "auto_map": {
            "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
            "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
        },
        **{"do_convert_rgb": True, "image_processor_type": "Phi3VImageProcessor", "num_crops": 4},
        **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        **{"num_img_tokens": 144, "processor_class": "Phi3VProcessor"},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    _tokenizer().save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "model_max_length": 131072, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    save_file(weights(seed), str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the weights by the hub's names."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.15) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * scale

    language = {"model.embed_tokens.weight": normal(32064, HIDDEN), "model.norm.weight": 1 + normal(HIDDEN)}
    language["lm_head.weight"] = normal(32064, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        language |= {f"{name}.{norm}_layernorm.weight": 1 + normal(HIDDEN) for norm in ("input", "post_attention")}
        language |= {
            f"{name}.self_attn.qkv_proj.weight": normal(3 * HIDDEN, HIDDEN, scale=0.5),
            f"{name}.self_attn.o_proj.weight": normal(HIDDEN, HIDDEN, scale=0.5),
            f"{name}.mlp.gate_up_proj.weight": normal(4 * HIDDEN, HIDDEN, scale=0.5),
            f"{name}.mlp.down_proj.weight": normal(HIDDEN, 2 * HIDDEN, scale=0.5),
        }
    images = "model.vision_embed_tokens"
    tower = f"{images}.img_processor.vision_model"
    found = {
        f"{images}.glb_GN": normal(1, 1, 4 * TOWER),
        f"{images}.sub_GN": normal(1, 1, 1, 4 * TOWER),
        f"{images}.img_projection.0.weight": normal(HIDDEN, 4 * TOWER),
        f"{images}.img_projection.0.bias": normal(HIDDEN),
        f"{images}.img_projection.2.weight": normal(HIDDEN, HIDDEN, scale=0.5),
        f"{images}.img_projection.2.bias": normal(HIDDEN),
        f"{tower}.embeddings.class_embedding": normal(TOWER),
        f"{tower}.embeddings.patch_embedding.weight": normal(TOWER, 3, 14, 14, scale=0.05),
        f"{tower}.embeddings.position_embedding.weight": normal(577, TOWER),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        found |= {f"{tower}.{norm}.weight": 1 + normal(TOWER), f"{tower}.{norm}.bias": normal(TOWER)}
    for layer in range(3):
        name = f"{tower}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"{name}.{norm}.weight": 1 + normal(TOWER), f"{name}.{norm}.bias": normal(TOWER)}
        for part in ("q", "k", "v", "out"):
            found |= {f"{name}.self_attn.{part}_proj.weight": normal(TOWER, TOWER)}
            found |= {f"{name}.self_attn.{part}_proj.bias": normal(TOWER)}
        found |= {f"{name}.mlp.fc1.weight": normal(2 * TOWER, TOWER), f"{name}.mlp.fc1.bias": normal(2 * TOWER)}
        found |= {f"{name}.mlp.fc2.weight": normal(TOWER, 2 * TOWER), f"{name}.mlp.fc2.bias": normal(TOWER)}
    return language | found


def _tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes and single characters; control tokens and the blank have the real ids."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    letters = "bcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!<|>_/-'"
    used = {**dict(enumerate(letters, 300)), **PIECES}
    vocabulary |= {used.get(number, f"§{number}"): number for number in range(259, 32000)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for token in ("<unk>", "<s>", "</s>"):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    for number in range(45):
        name = NAMED.get(number, f"<|placeholder{number}|>")
        rstrip = name not in ("<|endoftext|>", "<|system|>", "<|end|>", "<|user|>")
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=rstrip)])
    return tokenizer
