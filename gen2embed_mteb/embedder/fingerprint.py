"""A digest of everything that decides a model's vectors, so that stored vectors are never taken for another model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

FORMAT = 2
"""Changes when the digest of one and the same model does."""

_NOT_DECISIVE = {
    # Names, versions and places.
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "id2label",
    "label2id",
    "name_or_path",
    "problem_type",
    "transformers_version",
    # The types of the weights are in the digest with the weights themselves.
    "dtype",
    "torch_dtype",
    # What is returned beside the vectors, and how training and generation go.
    "bos_token_id",
    "chunk_size_feed_forward",
    "eos_token_id",
    "gradient_checkpointing",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "use_cache",
}


def fingerprint(model: Gen2Embed) -> str:
    """Digest everything that decides the vectors of a model.

    That is: weights, adapter included, with their types; how strong each adapter is, and whether it is switched on;
    the model's configuration (positions, sliding window, …); all modules behind the model; prompt, system prompts,
    layout, processor settings, length, truncation, resize policy and attention. Versions and places are left out, and
    so is what a configuration leaves unset (null, false, empty), which other versions of transformers may not list.

    Args:
        model: The model as it is now; reading its weights takes about a second a gigabyte.

    Returns:
        64 hexadecimal digits.
    """
    import torch

    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    image_processor = getattr(model.processor, "image_processor", None)
    settings: dict[str, Any] = {
        "format": FORMAT,
        "config": _canonical(model[0].model.config.to_dict()),
        "modules": [_module_settings(module) for module in model],
        "adapters": _adapter_settings(model[0].model),
        "template": model.processor.chat_template,
        "prompts": [model.side_prompt("query"), model.side_prompt("document")],
        "layout": model.layout,
        "max_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "resize": model.image_options.resize,
        "min_side": model.image_options.min_side,
        **({"exif_orientation": True} if model.image_options.exif_orientation else {}),
        "image_processor": _canonical(image_processor.to_dict()) if image_processor is not None else None,
        "tokenizer": hashlib.blake2b(_tokenizer_settings(model.tokenizer)).hexdigest(),
        "attention": getattr(model[0].model.config, "_attn_implementation", None),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    """A configuration without what decides nothing, and without what is unset."""
    if isinstance(value, Mapping):
        kept = {str(key): _canonical(part) for key, part in value.items() if str(key) not in _NOT_DECISIVE}
        return {key: part for key, part in kept.items() if part not in (None, {}, []) and part is not False}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _module_settings(module: Any) -> dict[str, Any]:
    """A module's class and configuration, those of modules in it included (`Router`)."""
    inner = [part for part in module.modules() if part is not module and hasattr(part, "get_config_dict")]
    return {
        "class": type(module).__name__,
        "config": _canonical(module.get_config_dict()) if hasattr(module, "get_config_dict") else {},
        "inside": [_module_settings(part) for part in inner],
    }


def _adapter_settings(model: Any) -> list[dict[str, Any]]:
    """What decides how a layer uses its adapters, besides their weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [
        {
            "layer": name,
            "class": type(module).__name__,
            "active": list(module.active_adapters),
            "off": module.disable_adapters,
            "merged": list(getattr(module, "merged_adapters", [])),
            "scaling": dict(getattr(module, "scaling", {})),
            "variants": sorted(
                f"{key}:{type(one).__name__}" for key, one in getattr(module, "lora_variant", {}).items()
            ),
            "tokens": {key: list(one) for key, one in getattr(module, "token_indices", {}).items()},
        }
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]


def _tokenizer_settings(tokenizer: Any) -> bytes:
    """The tokenizer without the cutting and padding of the call before, which decide no vector."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None)
    return json.dumps(state, sort_keys=True).encode()
