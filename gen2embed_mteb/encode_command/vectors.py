r"""Vectors as they are stored: their first numbers alone, and rounded; what a row becomes depends on that row alone.

| precision | stored | the vector is |
| --- | --- | --- |
| float32 | the numbers | what is stored |
| float16 | rounded to the nearest | what is stored, up to 2^-11 of each number |
| int8 | round(127 v / max \|v\|), and scale = max \|v\| / 127 | stored x scale, up to half the scale |
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError

LARGEST = 127
"""The largest number of int8 that is used; -128 is not, so that both signs are treated alike."""


class Stored(NamedTuple):
    """Rounded vectors.

    Attributes:
        values: (n, d) float32, float16 or int8.
        scale: (n,) float32, by which a row of int8 is multiplied; None for the other types.
    """

    values: npt.NDArray[np.generic]
    scale: npt.NDArray[np.float32] | None


def shortened(vectors: npt.NDArray[np.float32], dim: int | None) -> npt.NDArray[np.float32]:
    """Return the first numbers of unit vectors, as unit vectors again.

    Args:
        vectors: (n, d) float32, unit rows.
        dim: How many numbers are kept; None: all.

    Returns:
        (n, dim) float32; a row that has only zeros there stays zero.

    Raises:
        Gen2EmbedError: The vectors have fewer numbers.
    """
    if dim is None or not len(vectors):
        return vectors
    if dim > vectors.shape[1]:
        raise Gen2EmbedError(f"truncate_dim is {dim}, but vectors have {vectors.shape[1]} numbers; pass fewer")
    kept = vectors[:, :dim].astype(np.float64)
    norms = np.sqrt(np.square(kept).sum(axis=1, keepdims=True))
    return np.asarray(kept / np.where(norms > 0, norms, 1), np.float32)


def rounded(vectors: npt.NDArray[np.float32], precision: str) -> Stored:
    """Round vectors to a type.

    Args:
        vectors: (n, d) float32.
        precision: `float32`, `float16` or `int8`.
    """
    if precision != "int8":
        return Stored(vectors.astype(precision), None)
    scale = (np.abs(vectors).max(axis=1) / LARGEST).astype(np.float32) if len(vectors) else np.zeros(0, np.float32)
    divided = vectors / np.where(scale > 0, scale, 1)[:, None]
    return Stored(np.clip(np.rint(divided), -LARGEST, LARGEST).astype(np.int8), scale)


def restored(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Return stored vectors as unit rows, for the cosine; the scale of int8 has no effect on it.

    Args:
        values: (n, d) float32, float16 or int8.

    Returns:
        (n, d) float32; float32 is returned as it is.
    """
    if values.dtype == np.float32:
        return np.asarray(values, np.float32)
    wide = values.astype(np.float32)
    norms = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
    return np.asarray(wide / np.where(norms > 0, norms, 1), np.float32)
