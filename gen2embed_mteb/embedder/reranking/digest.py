"""A digest of what decides a reranker's scores, beside the embedder that it shares its weights with."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.reranking.reranker import Reranker


def reranker_digest(reranker: Reranker, fingerprint: str) -> str:
    """Digest everything that decides the scores of a reranker.

    Args:
        reranker: The reranker; an output layer that is not tied is read.
        fingerprint: The fingerprint of its embedder.

    Returns:
        64 hexadecimal digits.
    """
    model = reranker[0].model
    settings = {
        "embedder": fingerprint,
        "framing": reranker.framing.name,
        "templates": [reranker._template, reranker._second_template],
        "options": reranker._options,
        "max_length": reranker.max_seq_length,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    for name, tensor in sorted(output.state_dict().items()):
        if tensor.data_ptr() != inputs.weight.data_ptr():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
