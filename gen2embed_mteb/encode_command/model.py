"""The model of an index: loaded by its flags, described in the manifest, and loaded again by what the manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.config import ModelOptions
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

OF_THE_MACHINE = ("device",)
"""Flags of a model that another machine may set otherwise."""


def load(options: ModelOptions, min_side: int) -> Gen2Embed:
    """Load a model; bulk encoding resizes its images, and enlarges them by the same rule.

    Args:
        options: Its flags.
        min_side: The least side of an image.
    """
    from gen2embed_mteb.embedder.model import Gen2Embed

    own: dict[str, Any] = {"layout": options.layout, "pooling": options.pooling}
    return Gen2Embed(options.model_name, min_side=min_side, **own, **options.arguments())


def described(model: Gen2Embed, options: ModelOptions, side: str) -> dict[str, Any]:
    """Return what a manifest says of a model.

    Args:
        model: The model.
        options: The flags by which it was loaded.
        side: The side that was encoded.

    Returns:
        Its name, revision, prompt with its texts, readout, and the flags, by which it is loaded again.
    """
    from gen2embed_mteb.embedder.passes.phrase_pooling import state_name

    flags = {field.name: getattr(options, field.name) for field in fields(options)}
    flags |= {"revision": model.revision or options.revision}
    return {
        "name": options.model_name,
        "revision": model.revision,
        "prompt_mode": model.prompt_mode,
        "prompt": model.render("…", task=side),
        "readout": state_name(model),
        "flags": {name: value for name, value in flags.items() if name not in OF_THE_MACHINE},
    }


def options_from(stated: Mapping[str, Any], **other: Any) -> ModelOptions:
    """Return the flags by which the model of a manifest is loaded.

    Args:
        stated: What the manifest says of the model.
        other: Flags that take precedence.

    Raises:
        Gen2EmbedError: The manifest has other flags than this version.
    """
    try:
        return ModelOptions(**{**stated["flags"], **other})
    except (LookupError, TypeError) as error:
        raise Gen2EmbedError(
            f"the manifest says nothing usable of its model ({error}); encode the data again"
        ) from error
