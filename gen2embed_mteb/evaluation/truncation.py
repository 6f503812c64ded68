"""Cutting stored vectors to their first dimensions, as Matryoshka training makes useful.

Vectors are stored in full width, so that all widths share one encoding. The cut comes behind a calibration: so it is in
sentence-transformers, which cuts what the last module returns, and a calibration is a module. Hence a figure is that of
`SentenceTransformer(folder, truncate_dim=N)` compared by the cosine. CSLS comes behind the cut, since it describes the
vectors that are searched.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError

_CHUNK = 4096
"""Vectors that are in memory in float64 at a time."""


def cut(vectors: npt.NDArray[np.float32], width: int | None) -> npt.NDArray[np.float32]:
    """Return the first dimensions of vectors, brought to length 1 again; equal vectors stay equal, to the last bit.

    Args:
        vectors: (n, d) float32.
        width: How many dimensions are kept; `None`: all, and the vectors are returned as they are.

    Returns:
        (n, width) float32, unit rows; a row that is 0 in all of these dimensions stays 0.

    Raises:
        Gen2EmbedError: The vectors have fewer dimensions.
    """
    if width is None or not len(vectors):
        return vectors
    if width > vectors.shape[1]:
        raise Gen2EmbedError(f"truncate_dim is {width}, but the vectors have {vectors.shape[1]} dimensions")
    out = np.empty((len(vectors), width), np.float32)
    for start in range(0, len(vectors), _CHUNK):
        rows = vectors[start : start + _CHUNK, :width].astype(np.float64)
        # einsum sums every row in the same order.
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, optimize=False))[:, None]
        out[start : start + _CHUNK] = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
    return out
