"""CSLS: cosine similarity with a correction for hubs, the candidates that are near to many queries.

    csls(q, c) = 2 cos(q, c) - r(c),    r(c) = the mean cosine of c with its K nearest queries

(Conneau et al., 2018, "Word translation without parallel data", Sec. 2.3.) The same mean on the query's side is left
out: it is one number per query, which changes no order of candidates. r is computed from a set of queries, whose right
candidates are not needed. If these are the queries that are scored, the figure is transductive.

In an index it is one number per candidate.

Cost: one matrix product of queries and candidates in blocks, and for each candidate the exact products with the queries
that may be among its nearest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError

NEIGHBORS = 10
"""K, as in the paper of CSLS."""
_MOST_SCORES = 2**24
"""Products that are in memory at a time: 64 MiB."""


def inner_products(rows: npt.NDArray[np.float32], vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the inner products of rows with a vector; that of a row depends on nothing but the row and the vector.

    einsum sums every row in the same order. A matrix product may not: the products of equal rows could differ in the
    last bit, depending on their position, and a tie would be decided by chance.

    Args:
        rows: (n, d) float32.
        vector: (d,) float32.

    Returns:
        (n,) float32.
    """
    found: npt.NDArray[np.float32] = np.einsum("nd,d->n", rows, vector, optimize=False)
    return found


def hubness(
    candidates: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], neighbors: int = NEIGHBORS
) -> npt.NDArray[np.float64]:
    """Return r: for each candidate, the mean cosine with its nearest queries.

    Equal candidates get equal numbers, wherever they stand and however many threads a matrix product has: the product
    only finds the queries that may be among the nearest, within a proven bound of its error, and `inner_products` makes
    the decision.

    Args:
        candidates: (m, d) float32, unit rows.
        queries: (n, d) float32, unit rows, n >= 1; each query once.
        neighbors: K; if there are fewer queries, all count.

    Returns:
        (m,) float64.

    Raises:
        Gen2EmbedError: The shapes do not fit, there is no query, or K is less than 1.
    """
    if candidates.ndim != 2 or queries.ndim != 2 or candidates.shape[1] != queries.shape[1] or not len(queries):
        raise Gen2EmbedError(
            f"candidates {candidates.shape} and queries {queries.shape} do not fit: expected (m, d) and (n, d), n >= 1"
        )
    if neighbors < 1:
        raise Gen2EmbedError(f"neighbors is {neighbors}; pass 1 or more")
    count = min(neighbors, len(queries))
    # Both ways of summing are off by at most d 2^-24 |q| |c|, so that a query that is among the nearest by one is no
    # more than four times that below the K-th by the other; 1.1: the vectors' lengths are 1 but for rounding.
    margin = np.float32(4 * 1.1 * candidates.shape[1] * 2.0**-24)
    found = np.empty(len(candidates))
    step = max(1, _MOST_SCORES // len(queries))
    for start in range(0, len(candidates), step):
        block = candidates[start : start + step]
        rough = block @ queries.T
        least = np.partition(rough, len(queries) - count, axis=1)[:, len(queries) - count] - margin
        for row, candidate in enumerate(block):
            near = inner_products(queries[rough[row] >= least[row]], candidate)
            found[start + row] = np.sort(near)[-count:].astype(np.float64).mean()
    return found


def csls(cosines: npt.NDArray[np.float32], hubs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the scores of candidates.

    Args:
        cosines: (..., m) float32, of queries with m candidates.
        hubs: (m,) float64, what `hubness` returned for these candidates.

    Returns:
        (..., m) float64.
    """
    return 2 * cosines.astype(np.float64) - hubs
