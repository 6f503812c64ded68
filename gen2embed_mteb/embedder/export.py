"""Exporting a base model or an adapter as a directory that plain `SentenceTransformer` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt


def export(
    model: str | Path,
    output_dir: str | Path,
    *,
    adapter: str | Path | None = None,
    prompt_mode: str | HierarchicalPrompt | None = None,
    **options: Any,
) -> Path:
    """Write a directory that plain `SentenceTransformer` loads; an adapter is merged into the weights.

    Args:
        model: Hub id or local directory of a base model, an adapter, or an exported model.
        output_dir: Where to write; the directory must be missing or empty.
        adapter: Hub id or directory of an adapter.
        prompt_mode: The name of a strategy, or a prompt of the caller's own; `None` as in `Gen2Embed`.
        options: Further arguments of `Gen2Embed`.

    Returns:
        The directory.

    Raises:
        FileExistsError: `output_dir` is not empty.
        OSError: The disk is full.
    """
    output = empty_directory(output_dir)
    Gen2Embed(model, adapter=adapter, prompt_mode=prompt_mode, **options).save_pretrained(str(output))
    return output


def empty_directory(path: str | Path) -> Path:
    """Return the path, if nothing is there yet that new files could mix with.

    Raises:
        FileExistsError: The path is a file, or a directory that is not empty.
    """
    directory = Path(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not an empty directory; choose another, or remove it first")
    return directory
