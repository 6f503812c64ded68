"""A second copy of the token embedding, which some checkpoints of Phi-3.5-V hold (`vision_embed_tokens.wte`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError

_COPY = re.compile(r"(^|\.)vision_embed_tokens\.wte\.weight$")


def check_copy(files: Iterable[Path], model: Any) -> None:
    """Refuse weights whose second copy of the token embedding differs from the first; it is not loaded.

    Args:
        files: The weight files, safetensors.
        model: The loaded model.

    Raises:
        Gen2EmbedError: The two differ, so that which one the model was trained with is not known.
    """
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if not _COPY.search(name):
                    continue
                copy = file.get_tensor(name)
                embedding = model.get_input_embeddings().weight
                if copy.shape != embedding.shape or not bool((copy.to(embedding.dtype) == embedding.cpu()).all()):
                    raise Gen2EmbedError(
                        f"{path}: {name} differs from the token embedding, of which it must be a copy; copy or "
                        "download the weights again"
                    )
