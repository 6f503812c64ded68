"""The sum of two vectors for an input with an image and a text, as UniME's first stage is used.

arXiv 2504.17432, Sec. 3.2.2: a model that was trained on texts alone has learnt to sum up a text, or a picture, but not
both together. So each is encoded with its own prompt, and the two unit vectors are added. Whether UniME normalises
before the sum is not said; here both count alike, and the sum is normalised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.embedder.preparation.inputs import Content, content_of
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

_MARKS = re.compile(r"<\|image_[1-9]\|>\n?")


def encode_sum_of_parts(
    model: Gen2Embed, inputs: Sequence[Any], side: Side = "document", **options: Any
) -> npt.NDArray[np.float32]:
    """Encode inputs; one with images and a text becomes the sum of what the images and the text become.

    Args:
        model: The model, with a prompt for texts and images alone, such as `unime`.
        inputs: n inputs, as `Gen2Embed.encode` takes them.
        side: `query` or `document`.
        options: Options of `encode`: `batch_size`, `show_progress_bar`, …

    Returns:
        (n, d) float32 unit rows. A row without images, or without a text beside them, is what `encode` gives.

    Raises:
        ImageError: An image cannot be opened.
        TypeError: An input is of a type that `Gen2Embed.encode` does not accept.
    """
    parts: list[Content] = []
    owners: list[int] = []
    for number, sample in enumerate(inputs):
        content = content_of(sample, model.image_root, model.image_options)
        text = _MARKS.sub("", content.text)
        both = bool(content.images) and bool(text.strip())
        split = [replace(content, text=""), replace(content, text=text, images=())] if both else [content]
        parts += split
        owners += [number] * len(split)
    encode = model.encode_query if side == "query" else model.encode_document
    if not parts:
        return np.zeros((0, model.get_embedding_dimension() or 0), np.float32)
    vectors = np.asarray(encode(parts, convert_to_numpy=True, **options), dtype=np.float32)
    sums = np.zeros((len(inputs), vectors.shape[1]), np.float32)
    np.add.at(sums, owners, vectors)
    single = np.bincount(owners, minlength=len(inputs)) == 1
    norms = np.where(single, 1, np.linalg.norm(sums, axis=1))
    return np.asarray(sums / norms[:, None], dtype=np.float32)
