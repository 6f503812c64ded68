"""GGUF files: one file with the configuration, the tokenizer and the quantised weights of a text-only model.

transformers dequantises it while loading, with the package gguf; what is saved is safetensors. No code runs from it.
"""

from __future__ import annotations

import stat
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.model_folder.weight_files import ModelFolderError

_MAGIC = b"GGUF"


def check_gguf(folder: Path, name: str) -> None:
    """Check that a GGUF file can be read.

    Args:
        folder: The model's folder.
        name: The name of the file in it.

    Raises:
        ModelFolderError: It is not a GGUF file of this folder, the folder holds an exported model or an adapter, or the
            package gguf is missing.
    """
    path = folder / name
    if Path(name).name != name or not name.endswith(".gguf"):
        raise ModelFolderError(f"gguf_file is {name!r}; pass the name of a .gguf file in {folder}")
    for other in ("modules.json", "adapter_config.json"):
        if (folder / other).is_file():
            raise ModelFolderError(f"{folder / other}: gguf_file is for base models; leave it out to load this folder")
    if not path.is_file() or not stat.S_ISREG(path.stat().st_mode):
        found = ", ".join(sorted(one.name for one in folder.glob("*.gguf"))) or "none"
        raise ModelFolderError(f"{path} not found (GGUF files there: {found}); correct gguf_file")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelFolderError(f"{path}: not a GGUF file; copy or download it again")
    if find_spec("gguf") is None:
        raise ModelFolderError(
            f"{path}: GGUF files are read by the package gguf, which is missing: pip install 'gen2embed[gguf]'"
        )


def dense_options() -> dict[str, Any]:
    """Return the option of `from_pretrained` that makes plain weights of quantised ones.

    Otherwise transformers 5.23 keeps them quantised where the package kernels is installed, with code from the hub.
    """
    from transformers.utils.quantization_config import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_gguf(model: Any) -> None:
    """Remove the mark of a quantised model, after its weights were made plain: with it, nothing could be saved."""
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
