"""What the files of a model's directory tell about it, without loading it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def facts_of(directory: Path) -> dict[str, Any]:
    """Reads sizes from the headers of a model's weights, the rest from its configuration.

    Args:
        directory: A base model, an exported one, or an adapter.

    Returns:
        Fields of `models.Model`: parameters (without the output layer), bytes each, longest input, dimensions; of an
        adapter the model it is for, and nothing else.

    Raises:
        ValueError: The directory is not a model's; the message names it and the remedy.
    """
    try:
        adapter = directory / "adapter_config.json"
        if adapter.is_file():
            return {"adapted_from": json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")}
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        tensors = {
            name: tensor
            for path in sorted(directory.glob("*.safetensors"))
            for name, tensor in _header(path).items()
            if name != "__metadata__" and not name.startswith("lm_head.")
        }
        sizes = {name: math.prod(tensor["shape"]) for name, tensor in tensors.items()}
        text = config.get("text_config", config)
        return {
            "num_parameters": sum(sizes.values()),
            "num_embedding_parameters": sum(
                size for name, size in sizes.items() if name.endswith("embed_tokens.weight")
            ),
            "parameter_bytes": max((_BYTES[tensor["dtype"]] for tensor in tensors.values()), default=4),
            "max_tokens": text.get("max_position_embeddings"),
            "dimensions": text.get("hidden_size"),
        }
    except (OSError, ValueError, KeyError, AttributeError, struct.error) as error:
        raise Gen2EmbedError(
            f"{directory}: not a model that Gen2Embed can load ({type(error).__name__}: {error}); point "
            "GEN2EMBED_MODEL at an exported model, a base model, an adapter or a hub id"
        ) from error


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of its length, then names, types and shapes as JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))
