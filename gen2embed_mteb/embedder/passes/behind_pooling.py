"""The modules behind pooling, which `encode` and bulk encoding run in the same way.

A saved folder may list more modules than the model, pooling and normalisation: a `Dense` that was trained on top, a
`LayerNorm`, a `Router` with modules per side. They are part of the model, so every way of encoding must run them.
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
"""The types of modules that compute a vector from a vector."""


def run_modules(
    model: SentenceTransformer, parts: list[tuple[str, torch.nn.Module]], features: dict[str, Any], **kwargs: Any
) -> dict[str, Any]:
    """Run modules in order, as sentence-transformers does, but normalise in float32: norms in bfloat16 are off by 1e-3.

    Args:
        model: The model that the modules belong to.
        parts: Names and modules, in the order in which they run.
        features: The input of the first module.
        kwargs: Arguments for the modules that ask for them.

    Returns:
        The output of the last module.
    """
    for name, module in parts:
        wanted = {*(model.module_kwargs or {}).get(name, ()), *getattr(module, "forward_kwargs", ())}
        passed = kwargs if isinstance(module, Router) else {key: kwargs[key] for key in wanted & kwargs.keys()}
        if isinstance(module, Normalize) and module.module_input_name in features:
            features[module.module_input_name] = features[module.module_input_name].float()
        features = module(features, **passed)
    return features


def finish(model: SentenceTransformer, vectors: torch.Tensor, task: str | None) -> torch.Tensor:
    """Turn pooled vectors into those that `encode` returns: run all modules behind pooling, and truncate the result.

    Args:
        model: The model.
        vectors: (n, d), in any floating type.
        task: "query", "document", or `None`.

    Returns:
        (n, e) float32; e is `truncate_dim`, or else the width that the last module returns.
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
        Gen2EmbedError: There is such a module; the message names it.
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
