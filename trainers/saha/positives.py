"""The positives of queries: one for each, or several, all of which are known as no negatives of it.

With several, Algorithm 1 reads as follows. The pool of a query holds none of its positives. A candidate is owned by
every query that it is a positive of. A query that shares a positive with the anchor, or with a member that was taken
before it, is no member. So whichever positive of each query a training step takes, none of them is another query's
positive. Where every query has one positive, these are the rules of the paper: no two owners of different candidates
share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.saha.scores import Integers


class KnownPositives:
    """The positives of N queries, as rows of the candidates.

    Args:
        positives: (N,) The first positive of each query.
        more: The further ones of each query, N lists; `None`: there are none.
        queries: N.
        candidates: The number of candidates.
        several: Whether a query may have several positives; variant `official` knows one for each.

    Attributes:
        first: (N,) int64, the first positive of each query.
        sets: All positives of each query; `None` where every query has one.
        most: How many positives a query has at most.
        by_positive: Every query once for each of its positives, sorted by positive, then by query.
        candidates: (len(by_positive),) int64, the positive at each of these places.

    Raises:
        Gen2EmbedError: Shape or type are wrong, a number is no candidate, or a query has several positives and may not.
    """

    def __init__(
        self,
        positives: Any,
        more: Sequence[Sequence[int]] | None,
        queries: int,
        candidates: int,
        *,
        several: bool = True,
    ) -> None:
        self.first = _checked(positives, queries, candidates)
        self.sets: list[frozenset[int]] | None = None
        owners, owned = np.arange(queries), self.first
        if more is not None and any(len(one) for one in more):
            if not several:
                raise Gen2EmbedError(
                    "variant 'official' knows one positive per query, and there are queries with several; pass variant "
                    "'paper'"
                )
            if len(more) != queries:
                raise Gen2EmbedError(
                    f"more_positives has {len(more)} lists; give one for each of the {queries} queries"
                )
            self.sets = [
                frozenset((first, *map(int, one))) for first, one in zip(self.first.tolist(), more, strict=True)
            ]
            owners = np.repeat(owners, [len(one) for one in self.sets])
            owned = np.fromiter((positive for one in self.sets for positive in sorted(one)), np.int64, len(owners))
            _refuse_outside("more_positives", owners, owned, candidates)
        self.most = 1 if self.sets is None else max(map(len, self.sets), default=1)
        order = np.lexsort((owners, owned))
        self.by_positive, self.candidates = owners[order], owned[order]

    def of(self, queries: Integers) -> Integers:
        """Return all positives of some queries, in one array."""
        if self.sets is None:
            return self.first[queries]
        return np.array([positive for query in queries.tolist() for positive in self.sets[query]], np.int64)

    def without(self, query: int, candidates: Integers) -> npt.NDArray[np.bool_]:
        """Return where candidates are not positives of a query, (n,) bool."""
        if self.sets is None:
            return candidates != self.first[query]
        return ~np.isin(candidates, list(self.sets[query]))

    def disjoint(self, anchor: int, queries: Sequence[int], most: int) -> list[int]:
        """Return the first of some queries that share no positive with the anchor or with one before, each once.

        Args:
            anchor: The anchor.
            queries: Other queries, in the order in which they are taken.
            most: How many are returned at most.
        """
        if self.sets is None:
            return list(queries[:most])
        held, taken = set(self.sets[anchor]), list[int]()
        for query in queries:
            if len(taken) < most and held.isdisjoint(self.sets[query]):
                held |= self.sets[query]
                taken.append(query)
        return taken


def _checked(positives: Any, queries: int, candidates: int) -> Integers:
    array = positives.cpu().numpy() if isinstance(positives, torch.Tensor) else np.asarray(positives)
    if array.shape != (queries,):
        raise Gen2EmbedError(f"positives has shape {array.shape}; give one candidate for each of the {queries} queries")
    if array.dtype.kind not in "iu":
        raise Gen2EmbedError(f"positives holds {array.dtype}; give the candidates' row numbers as integers")
    _refuse_outside("positives", np.arange(queries), array, candidates)
    return array.astype(np.int64)


def _refuse_outside(name: str, queries: Integers, positives: Integers, candidates: int) -> None:
    wrong = np.flatnonzero((positives < 0) | (positives >= candidates))
    if len(wrong):
        raise Gen2EmbedError(
            f"{name}[{queries[wrong[0]]}] is {positives[wrong[0]]}; candidate_embeddings has rows 0 to "
            f"{candidates - 1} only"
        )
