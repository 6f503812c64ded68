"""The embedded default model, a tiny generative Qwen2-VL trained here from scratch, and its benchmark MMEB-mini."""

from pathlib import Path

from gen2embed_mteb.names import MINI_FOLDER


def model_dir() -> Path:
    """Return the directory of `gen2embed-mini`, in the layout of a hub repository."""
    return MINI_FOLDER
