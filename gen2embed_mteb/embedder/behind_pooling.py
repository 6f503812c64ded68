"""The modules behind the pooled vector, run alike by `encode` and by bulk encoding.

A saved folder may list more than the model, pooling and normalisation: a `Dense` that was trained on top, a
`LayerNorm`, a `Router` with modules of each side. They belong to the model, whoever encodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sentence_transformers.base.modules import Module, Router
from sentence_transformers.sentence_transformer.modules import Normalize

from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

KNOWN = ("Dense", "Dropout", "LayerNorm", "Normalize", "Router")
"""Modules that compute a vector of a vector."""


def run_modules(
    model: SentenceTransformer, parts: list[tuple[str, torch.nn.Module]], features: dict[str, Any], **kwargs: Any
) -> dict[str, Any]:
    """Run modules in order, as sentence-transformers does, but normalise in float32: bfloat16 rows drift 1e-3.

    Args:
        model: The model that they are of.
        parts: Modules by name.
        features: What the first of them takes.
        kwargs: Passed to the modules that ask for them.

    Returns:
        What the last of them gives.
    """
    for name, module in parts:
        wanted = {*(model.module_kwargs or {}).get(name, ()), *getattr(module, "forward_kwargs", ())}
        passed = kwargs if isinstance(module, Router) else {key: kwargs[key] for key in wanted & kwargs.keys()}
        if isinstance(module, Normalize) and module.module_input_name in features:
            features[module.module_input_name] = features[module.module_input_name].float()
        features = module(features, **passed)
    return features


def finish(model: SentenceTransformer, vectors: torch.Tensor, task: str | None) -> torch.Tensor:
    """Make of pooled vectors what `encode` makes of them: all modules behind pooling are run, and the result is cut.

    Args:
        model: The model.
        vectors: (n, d), in any floating type.
        task: "query", "document", or `None`.

    Returns:
        (n, e) float32; e is `truncate_dim`, or what the last module returns.
    """
    behind = list(model.named_children())[2:]
    features = {"sentence_embedding": vectors, "task": task, "modality": "message"}
    embedding: torch.Tensor = run_modules(model, behind, features, task=task)["sentence_embedding"]
    return embedding.float()[:, : model.truncate_dim]


def require_known_modules(model: SentenceTransformer) -> None:
    """Refuse modules that `finish` cannot run on a pooled vector alone.

    Args:
        model: The model.

    Raises:
        Gen2EmbedError: There is one; the message names it.
    """
    names = [type(module).__name__ for module in model]
    if names[:2] != ["Transformer", "Pooling"]:
        raise Gen2EmbedError(
            f"this model is made of {', '.join(names)}; bulk encoding needs Transformer and Pooling, then any of "
            f"{', '.join(KNOWN)}. Use encode_query and encode_document"
        )
    behind = [part for module in list(model)[2:] for part in module.modules() if isinstance(part, Module)]
    for module in behind:
        known = type(module).__name__ in KNOWN
        if not known or getattr(module, "module_input_name", "sentence_embedding") != "sentence_embedding":
            raise Gen2EmbedError(
                f"bulk encoding cannot run the module {type(module).__name__} behind Pooling: it needs more than the "
                f"pooled vector. Known: {', '.join(KNOWN)}. Use encode_query and encode_document"
            )
