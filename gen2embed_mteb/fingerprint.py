"""A digest of everything that decides a model's vectors, so that stored vectors are never taken for another model's."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen2embed_mteb.model import Gen2Embed


def fingerprint(model: Gen2Embed) -> str:
    """Digest weights (adapter included), prompt, layout, processor settings, length, truncation and resize policy.

    Args:
        model: the model as it is now; reading its weights takes about a second a gigabyte.

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
        "template": model.processor.chat_template,
        "layout": model.layout,
        "max_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "resize": model.resize,
        "image_processor": image_processor.to_dict() if image_processor is not None else None,
        "tokenizer": hashlib.blake2b(model.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "attention": getattr(model[0].model.config, "_attn_implementation", None),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()
