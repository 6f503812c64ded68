"""A digest of everything that decides a model's vectors, so that stored vectors of another model are never reused.

Cost: one pass over all weights, about a second per gigabyte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

FORMAT = 2
"""The version of the digest; it changes whenever a new release gives the same model another digest."""

_NOT_DECISIVE = {
    # Names, versions and paths.
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
    # What is returned besides the vectors, and settings of training and generation.
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

    The digest covers the weights, adapter included, with their types; how strong each adapter is, and whether it is
    switched on; the model's configuration (positions, sliding window, …); all modules behind the model; readout,
    pooling, prompt, system prompts, prompts of datasets, layout, processor settings, length, truncation, resize policy
    and attention. It leaves out versions and paths. It also leaves out values that a configuration leaves unset (null,
    false, empty), since other versions of transformers may not list them.

    Args:
        model: The model as it is now; reading its weights takes about a second per gigabyte.

    Returns:
        64 hexadecimal digits.
    """
    import torch

    from gen2embed_mteb.embedder.prompts.dataset_prompts import all_of
    from gen2embed_mteb.embedder.readouts.readout import readout_of

    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    image_processor = getattr(model.processor, "image_processor", None)
    readout = readout_of(model[0].model)
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
        **model.image_options.orientation(),
        "image_processor": _canonical(image_processor.to_dict()) if image_processor is not None else None,
        "tokenizer": hashlib.blake2b(_tokenizer_settings(model.tokenizer)).hexdigest(),
        **({} if readout.is_default else readout.settings()),
        **({} if model.pooling == "last" else {"pooling": model.pooling}),
        **({"dataset_prompts": of_datasets} if (of_datasets := all_of(model)) else {}),
        "attention": getattr(model[0].model.config, "_attn_implementation", None),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    """Return a configuration without the keys that do not influence vectors, and without unset values."""
    if isinstance(value, Mapping):
        kept = {str(key): _canonical(part) for key, part in value.items() if str(key) not in _NOT_DECISIVE}
        return {key: part for key, part in kept.items() if part not in (None, {}, []) and part is not False}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _module_settings(module: Any) -> dict[str, Any]:
    """Return the class and configuration of a module and of the modules inside it (as in a `Router`)."""
    inner = [part for part in module.modules() if part is not module and hasattr(part, "get_config_dict")]
    return {
        "class": type(module).__name__,
        "config": _canonical(module.get_config_dict()) if hasattr(module, "get_config_dict") else {},
        "inside": [_module_settings(part) for part in inner],
    }


def _adapter_settings(model: Any) -> list[dict[str, Any]]:
    """Return what decides how each layer uses its adapters, besides their weights."""
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
    """Return the tokenizer without its truncation and padding state, which earlier calls leave and no vector needs."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None)
    return json.dumps(state, sort_keys=True).encode()
