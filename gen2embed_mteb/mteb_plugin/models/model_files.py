"""Reading facts about a model from the files of its directory, without loading it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.model_folder.loading import IMAGE_FILES
from gen2embed_mteb.errors import Gen2EmbedError

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_NOT_COUNTED = re.compile(r"(thinker\.)?lm_head\.|(talker|token2wav|code2wav)\.")
"""The tensors that an embedding model does not have: the output layer, and the parts that speak."""


def facts_of(directory: Path) -> dict[str, Any]:
    """Read sizes from the headers of a model's weights, and other facts from its configuration.

    Args:
        directory: A base model, an exported one, or an adapter.

    Returns:
        Fields of `model_table.Model`: number of parameters (without the output layer), bytes per parameter, longest
        input, dimensions, whether it takes images; for an adapter only its base model.

    Raises:
        ValueError: The directory is not a model's; the message names it and the remedy.
    """
    try:
        source = model_folder.Source(str(directory), directory, None)
        if (directory / model_folder.ADAPTER_FILE).is_file():
            model_folder.check_adapter_folder(directory)
            return {"adapted_from": model_folder.base_of_adapter(source)[0]}  # type: ignore[index]
        tensors = model_folder.check(source)
        config = model_folder.read_settings(directory / "config.json")
        config = config.get("thinker_config", config)  # as in `supported.reading_part`
        sizes = {name: tensor.size for name, tensor in tensors.items() if not _NOT_COUNTED.match(name)}
        text = config.get("text_config", config)
        return {
            "num_parameters": sum(sizes.values()),
            "num_embedding_parameters": sum(
                size for name, size in sizes.items() if name.endswith("embed_tokens.weight")
            ),
            "parameter_bytes": max((_BYTES[tensors[name].dtype] for name in sizes), default=4),
            "max_tokens": text.get("max_position_embeddings"),
            "dimensions": text.get("hidden_size"),
            "takes_images": any((directory / name).is_file() for name in IMAGE_FILES),
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Gen2EmbedError(
            f"{directory}: not a model that Gen2Embed can load ({type(error).__name__}: {error}); point "
            "GEN2EMBED_MODEL at an exported model, a base model, an adapter or a hub id"
        ) from error
