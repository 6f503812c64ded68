"""From vectors to places on a map: UMAP with the settings of the paper's Fig. 4, or the two principal components."""

from __future__ import annotations

import importlib.util

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError

TITLES = {"umap": "UMAP", "pca": "PCA"}
NEIGHBORS, MIN_DIST, SEED = 64, 0.5, 42
_FEWEST = 4
"""UMAP begins with eigenvectors, of which fewer points have too few."""


def check_projection(name: str) -> None:
    """Refuse UMAP where it is not installed, before anything is encoded.

    Args:
        name: One of `options.PROJECTIONS`.

    Raises:
        Gen2EmbedError: It is not installed; the message names the extra.
    """
    if name == "umap" and importlib.util.find_spec("umap") is None:
        raise Gen2EmbedError(
            "--projection umap needs umap-learn, which is not installed: pip install 'gen2embed[analysis]'; or pass "
            "--projection pca for two principal components, or none for the numbers alone"
        )


def projected(vectors: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float64]:
    """Return the places of vectors on a map, (n, 2).

    Args:
        vectors: (n, d).
        name: `umap` or `pca`.
    """
    if name == "pca" or len(vectors) < _FEWEST:
        return principal_components(vectors)
    import umap

    model = umap.UMAP(
        n_components=2,
        n_neighbors=min(NEIGHBORS, len(vectors) - 1),
        min_dist=MIN_DIST,
        random_state=SEED,
        n_jobs=1,
        init="spectral" if len(vectors) > 3 * _FEWEST else "random",
    )
    return np.asarray(model.fit_transform(vectors), dtype=np.float64)


def principal_components(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the two principal components of vectors, (n, 2); the same vectors give the same signs.

    Args:
        vectors: (n, d).
    """
    centered = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    places = np.zeros((len(vectors), 2))
    for number, axis in enumerate(axes[:2]):
        sign = np.sign(axis[np.abs(axis).argmax()]) or 1.0
        places[:, number] = sign * (centered @ axis)
    return places
