"""Model types that cannot embed by prompt alone, refused with the reason before a weight is read.

Any other type is taken, by the family written for it or by its own chat template.
"""

from __future__ import annotations

import re
from typing import Any

from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.errors import Gen2EmbedError, one_line

_GENERATION = re.compile(r"For[A-Z]\w*$")
TORCHVISION = "pip install 'gen2embed[image]'"


def check_supported(config: Any) -> None:
    """Refuse a configuration whose model gives no usable `last_hidden_state`.

    Args:
        config: The model's configuration in transformers.

    Raises:
        Gen2EmbedError: The type has no base class, reads images through cross-attention, or has an encoder of its own.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = config.model_type
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "cross_attention_layers", None):
        raise Gen2EmbedError(
            f"models of type {kind!r} read images through cross-attention layers: a text in a batch with an image "
            "would get another vector than alone. Use a model whose images are tokens of its text, as in Qwen2-VL"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise Gen2EmbedError(
            f"models of type {kind!r} have an encoder and a decoder: the last token of the input is not where the "
            "answer begins. Use a model with a decoder alone"
        )
    if getattr(config, "auto_map", None):  # code of its own, which the caller trusts
        return
    if family_of(kind).own_classes:
        return
    known = MODEL_MAPPING_NAMES.get(kind)
    name = known[0] if isinstance(known, (list, tuple)) else known
    if name is None or _GENERATION.search(name):
        found = "none" if name is None else f"only {name}"
        raise Gen2EmbedError(
            f"models of type {kind!r} have no class without an output layer in transformers (AutoModel: {found}), so "
            "that there is no last hidden state to embed with. Use another model"
        )


def reading_part(config: Any) -> Any:
    """Return the configuration of the part of a model that reads its input; the configuration itself for most models.

    Models that also speak (Qwen2.5-Omni) have a thinker, which reads text, images and sounds and writes text, and parts
    that say it. transformers loads the thinker alone from such a folder, and leaves out the weights of the others.

    Args:
        config: The configuration of the whole model.
    """
    part = getattr(config, "thinker_config", None)
    if part is None:
        return config
    part._name_or_path = config._name_or_path
    part._commit_hash = getattr(config, "_commit_hash", None)
    return part


def processor_error(name: str, error: Exception) -> Gen2EmbedError:
    """Return the error for a processor that cannot be loaded, with the package that is missing, if one is.

    Without torchvision, the part for videos is left out of a processor. Some processors do not allow that, and raise
    errors that do not say so.

    Args:
        name: The model.
        error: What loading the processor raised.
    """
    from transformers.utils import is_torchvision_available

    seen: BaseException | None = error
    missing = None
    while seen is not None and missing is None:
        text = str(seen)
        named = re.search(r"pip install ([\w.-]+)|requires the ([\w.-]+) library|No module named '(\w+)", text)
        if isinstance(seen, ImportError) and named:
            missing = next(part for part in named.groups() if part).lower()
        seen = seen.__cause__ or seen.__context__
    shown = f"({type(error).__name__}: {one_line(error)[:300]})"
    if missing is not None and missing != "torchvision":
        return Gen2EmbedError(f"{name}: its processor needs the package {missing}: pip install {missing} {shown}")
    if not is_torchvision_available():
        return Gen2EmbedError(
            f"{name}: its processor does not load without torchvision: {TORCHVISION}. If it still does not load, the "
            f"folder lacks a file of the processor {shown}"
        )
    return Gen2EmbedError(f"{name}: its processor does not load {shown}; copy or download the folder again")
