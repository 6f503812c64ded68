"""Exporting a base model or an adapter as a reranker that plain `CrossEncoder` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.export import empty_directory
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.reranking.framings import stock_framing


def export_reranker(model: str | Path, output_dir: str | Path, *, framing: str = "mcq", **options: Any) -> Path:
    """Write a directory that plain `CrossEncoder` loads; an adapter is merged into the weights.

    Args:
        model: Hub id or local directory of a base model, an adapter, or an exported model.
        output_dir: Where to write; the directory must be missing or empty.
        framing: How the model is asked: `mcq`, `yes-no` or `true-false`.
        options: Further arguments of `Gen2Embed`.

    Returns:
        The directory.

    Raises:
        FileExistsError: `output_dir` is not empty.
        Gen2EmbedError: The framing is unknown or not stock, or there is no output layer.
        OSError: The disk is full.
    """
    stock_framing(framing)  # before a model is loaded, which can take minutes
    output = empty_directory(output_dir)
    Gen2Embed(model, **options).reranker(framing).save(str(output))
    return output
