"""The baselines that SaHa is compared with (paper, Table VII): plain hard negatives, with and without a margin.

`hn` takes the k candidates most similar to a query, without its own positive. `hn-beta` first leaves out every
candidate n with sim(q, n) > sim(q, q+) + beta, since it may be a positive that nobody labelled. `in-batch` takes none:
each row is alone, and its negatives are what else happens to be in the batch.

Time: one exact search of all N queries for k + 1 candidates (N M d multiplications, see `search.py`). With `hn-beta`,
queries that have too few candidates within the margin are searched again, four times as deep each time, up to all M.
Memory above the vectors and the result: that of the search, and 50 MB for the candidates of a block of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.saha.positives import KnownPositives
from trainers.saha.scores import as_tensor, pair_scores
from trainers.saha.search import Backend, ExactSearch
from trainers.saha.search_protocol import Search

RESULTS_AT_ONCE = 2**22
"""The most queries times depth in one search: 50 MB of indices and similarities."""


@dataclass(frozen=True)
class Negatives:
    """The hard negatives of every query.

    Attributes:
        candidates: (N, k) int64, the most similar first, ties by the smaller index; -1 where there are not enough.
        similarities: (N, k) float32, NaN where the candidate is -1.
    """

    candidates: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32]


def hard_negatives(
    query_embeddings: npt.NDArray[np.float32],
    candidate_embeddings: npt.NDArray[np.float32],
    positives: npt.NDArray[np.int64],
    num_hard_negatives: int = 7,
    beta: float | None = None,
    *,
    more_positives: Sequence[Sequence[int]] | None = None,
    known_negatives: Sequence[Sequence[int]] | None = None,
    backend: Backend = "auto",
    search: Search | None = None,
) -> Negatives:
    """Find the k hard negatives of every query among all candidates; exactly, unless `search` is approximate.

    Args:
        query_embeddings: (N, d) unit rows.
        candidate_embeddings: (M, d) unit rows, distinct candidates.
        positives: (N,) int64, the positive of each query, as a row of `candidate_embeddings`.
        num_hard_negatives: k.
        beta: The margin of `hn-beta`; None for `hn`.
        more_positives: Further positives of each query, N lists: none of them is its negative. With `beta` the least
            similar of all its positives counts, so that the margin holds for whichever of them is trained.
        known_negatives: Negatives that each query has already, N lists: they are not found again.
        backend: See `ExactSearch`; changes the speed only.
        search: An opened search over the candidates; it can be approximate. None opens an exact one.

    Returns:
        The negatives. Memory beyond them is bounded: no N x M matrix is made, whatever the margin leaves out.

    Raises:
        ValueError: Shapes do not fit, or k is below 1.
    """
    if num_hard_negatives < 1:
        raise Gen2EmbedError(f"num_hard_negatives is {num_hard_negatives}; pass 1 or more")
    if positives.shape != (len(query_embeddings),):
        raise Gen2EmbedError(f"positives has shape {positives.shape}; expected ({len(query_embeddings)},)")
    search = search or ExactSearch(candidate_embeddings, backend=backend)
    num_candidates = len(candidate_embeddings)
    known = KnownPositives(positives, more_positives, len(query_embeddings), num_candidates)
    candidates = np.full((len(positives), num_hard_negatives), -1, dtype=np.int64)
    similarities = np.full(candidates.shape, np.nan, dtype=np.float32)
    limits = np.full(len(positives), np.inf, dtype=np.float32)
    if beta is not None:
        own = pair_scores(as_tensor(query_embeddings), known.by_positive, search.candidates, known.candidates)
        np.minimum.at(limits, known.by_positive, own)
        limits += np.float32(beta)
    left_out = _left_out(known, known_negatives)
    waiting = np.arange(len(positives))
    depth = min(num_hard_negatives + known.most, num_candidates)
    while len(waiting):
        unfinished = []
        block = max(1, RESULTS_AT_ONCE // depth)
        for start in range(0, len(waiting), block):
            numbers = waiting[start : start + block]
            found, scores = search.top_k(query_embeddings[numbers], depth)
            allowed = (found != known.first[numbers, None]) & (scores <= limits[numbers, None])
            if left_out is not None:
                for row, number in enumerate(numbers.tolist()):
                    allowed[row] &= ~np.isin(found[row], left_out[number])
            done = (allowed.sum(axis=1) >= num_hard_negatives) | (depth == num_candidates)
            # A stable sort puts the allowed candidates first and keeps their order.
            order = np.argsort(~allowed, axis=1, kind="stable")[:, :num_hard_negatives]
            taken = np.take_along_axis(allowed, order, axis=1)[done]
            kept = numbers[done], slice(order.shape[1])
            candidates[kept] = np.where(taken, np.take_along_axis(found, order, axis=1)[done], -1)
            similarities[kept] = np.where(taken, np.take_along_axis(scores, order, axis=1)[done], np.nan)
            unfinished.append(numbers[~done])
        waiting = np.concatenate(unfinished)
        # Only few queries have many candidates above the margin; they are searched again, four times as deep.
        depth = min(4 * depth, num_candidates)
    return Negatives(candidates, similarities)


def _left_out(
    known: KnownPositives, known_negatives: Sequence[Sequence[int]] | None
) -> list[npt.NDArray[np.int64]] | None:
    """Return what is no negative of each query beside its first positive; `None` if there is nothing."""
    if known.sets is None and not any(known_negatives or ()):
        return None
    sets = known.sets or [frozenset()] * len(known.first)
    more = known_negatives or [()] * len(known.first)
    return [np.array([*positives, *negatives], np.int64) for positives, negatives in zip(sets, more, strict=True)]
