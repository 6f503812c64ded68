"""Algorithm 1: clusters of queries that are each other's hard negatives, and not each other's positives (paper, IV-B).

For each query q in dataset order that is not yet used:

1. `pool`: the m k candidates most similar to q, its own positive left out.
2. The owner of a candidate is the query most similar to q among those whose positive it is.
3. Owners already taken are dropped: in phase 1 those of any cluster, in phase 2 those of a cluster of phase 2.
4. Of what is left, the k owners least similar to q become members: with their own positives, q's hard negatives.
5. q and its members are used.

Phase 1 goes over all queries, phase 2 over those still unused; in it, members of phase 1 may come again. A query with
no owner left is passed over, first to phase 2; what phase 2 leaves is filled in at the end (variant `paper`) or lost
(`official`).

Here the order-dependent pass is sequential, and only it. Pools are searched for a block of unused queries ahead, in one
product; queries that an earlier one of the block uses up are skipped, and the block is sized so that few are. The pools
of queries passed over are kept for phase 2, which therefore searches nothing. The owners of candidates with many owners
(labels) are compared in one product a block too; rows are gathered only for candidates with few.

Memory above the vectors: the search's own (see `search.py`), pools kept for phase 2 (12 x pool size bytes a query at
most), a float32 copy of the rows that own popular candidates where that takes 256 MB or less, and a block of scores
against them of 128 MB or less: under 1 GB for 100,000 pairs at d = 1536, k = 7, m = 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.saha.owner_scores import Crowd, LookAhead
from trainers.saha.scores import (
    SLICE,
    TILE,
    Floats,
    Integers,
    Vectors,
    canonical_scores,
    check_unit_rows,
    contested_places,
    error_bound,
    first_in_order,
    full_precision,
    pair_scores,
    sliced_terms,
    take,
)
from trainers.saha.search import Backend, ExactSearch

Variant = Literal["paper", "official"]

# A candidate with no more owners than this is never popular.
_POPULAR = 8


@dataclass(frozen=True)
class Clusters:
    """What Algorithm 1 forms: C clusters, each an anchor query and up to k members, which are queries too.

    Attributes:
        anchors: (C,) int64 queries, in the order their clusters were formed.
        members: (C, k) int64 queries in the order in which step 4 ranks them: the one least similar to the anchor first
            (with `labelled`, variant `official`: the one whose positive is most similar to the anchor first); then
            fillers; -1 where a cluster is short.
        phase: (C,) int64, 1 or 2; 2 for the clusters that fillers begin.
        similarities: (C, k) float32 inner product of the anchor's and the member's query embedding
            (`canonical_scores`); NaN where `members` is -1.
    """

    anchors: Integers
    members: Integers
    phase: Integers
    similarities: Floats


def mine_clusters(  # noqa: PLR0917 - the method's own parameters, in the order people know
    query_embeddings: Vectors,
    candidate_embeddings: Vectors,
    positives: npt.NDArray[np.integer] | torch.Tensor | Sequence[int],
    num_hard_negatives: int = 7,
    pool_multiplier: int = 6,
    variant: Variant = "paper",
    labelled: bool = False,
    *,
    backend: Backend = "auto",
    devices: Sequence[str] | None = None,
    tile: int = TILE,
) -> Clusters:
    """Mine clusters of hard negatives. The result is a function of the first seven arguments alone.

    Two candidates, or two owners, are compared by their inner products with the anchor (`canonical_scores`: exact,
    rounded to float32), equal ones by the smaller index.

    Fillers, the queries that both phases of variant `paper` leave over: in dataset order, each joins the first cluster,
    in order of formation, that has room and holds no query with the same positive, behind its members. One that fits
    nowhere becomes a cluster of its own, at the end, which later ones can join.

    Args:
        query_embeddings: (N, d) unit vectors, float16, bfloat16, float32 or float64; NumPy or torch.
        candidate_embeddings: (M, d) unit vectors of the distinct candidates, made by the same model.
        positives: (N,) for each query, the candidate that is its positive; candidates may be shared, or nobody's.
        num_hard_negatives: k, members a cluster.
        pool_multiplier: m; the pool holds m k candidates.
        variant: `paper`, or `official` for what the official code does instead. That fetches 2 m k candidates, drops
            the query's own positive afterwards, and walks down them to the first m k (in phase 2: through all of them)
            that still have a free owner, of which it takes the most similar: taken owners are dropped before step 2 and
            not after it. A query with no free owner in phase 2 is lost.
        labelled: The candidates are class labels (method: ImageNet_1K and its like). With variant `official`, step 4
            then keeps the order of retrieval: the owners of the k candidates most similar to q. Variant `paper` treats
            all data alike.
        backend: See `ExactSearch`; changes the speed only.
        devices: See `ExactSearch`; changes the speed only.
        tile: See `ExactSearch`; changes the speed and the memory only.

    Returns:
        The clusters. None holds a query twice, or two queries that share a positive. Those of phase 1 are disjoint,
        fillers included. With variant `paper` every query is in at least one.

    Raises:
        ValueError: Wrong input; the message names the first offending index.
    """
    if variant not in get_args(Variant):
        raise Gen2EmbedError(f"variant is {variant!r}; give 'paper' or 'official'")
    for name, value in (("num_hard_negatives", num_hard_negatives), ("pool_multiplier", pool_multiplier)):
        if value < 1:
            raise Gen2EmbedError(f"{name} is {value}; give 1 or more")
    queries = check_unit_rows(query_embeddings, "query_embeddings")
    search = ExactSearch(candidate_embeddings, backend=backend, devices=devices, tile=tile)
    if queries.shape[1] != search.candidates.shape[1]:
        raise Gen2EmbedError(
            f"query_embeddings are {queries.shape[1]} wide and candidate_embeddings {search.candidates.shape[1]}; "
            "embed both with one model"
        )
    owned = _checked_positives(positives, len(queries), len(search.candidates))
    with full_precision():
        miner = _Miner(
            queries,
            search,
            owned,
            k=num_hard_negatives,
            multiplier=pool_multiplier,
            official=variant == "official",
            labelled=labelled,
        )
        miner.run(1)
        miner.run(2)
        if variant == "paper":
            miner.fill()
        return miner.result()


def _checked_positives(
    positives: npt.NDArray[np.integer] | torch.Tensor | Sequence[int], queries: int, candidates: int
) -> Integers:
    array = positives.cpu().numpy() if isinstance(positives, torch.Tensor) else np.asarray(positives)
    if array.shape != (queries,):
        raise Gen2EmbedError(f"positives has shape {array.shape}; give one candidate for each of the {queries} queries")
    if array.dtype.kind not in "iu":
        raise Gen2EmbedError(f"positives holds {array.dtype}; give the candidates' row numbers as integers")
    wrong = np.flatnonzero((array < 0) | (array >= candidates))
    if len(wrong):
        raise Gen2EmbedError(
            f"positives[{wrong[0]}] is {array[wrong[0]]}; candidate_embeddings has rows 0 to {candidates - 1} only"
        )
    return array.astype(np.int64)


class _Miner:
    """The state of the greedy pass.

    `by_positive` lists all queries sorted by their positive, then by index: the owners of candidate c are
    `by_positive[starts[c] : starts[c] + owners[c]]`, and a place in that list stands for a query in what follows.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        search: ExactSearch,
        positives: Integers,
        *,
        k: int,
        multiplier: int,
        official: bool,
        labelled: bool,
    ) -> None:
        self.queries = queries
        self.search = search
        self.positives = positives
        self.k = k
        self.official = official
        self.labelled = labelled and self.official
        self.pool = multiplier * k
        self.owners = np.bincount(positives, minlength=len(search.candidates))
        self.one_to_one = bool(self.owners.max() == 1)
        self.starts = np.cumsum(self.owners) - self.owners
        self.by_positive = np.argsort(positives, kind="stable")
        self.places = np.argsort(self.by_positive)
        # Gathering a row costs about as much as a dozen of a product; an anchor gathers `pool` candidates' owners.
        self.popular = self.owners > max(_POPULAR, len(queries) // (12 * self.pool))
        self.crowd = Crowd(queries, positives, self.by_positive, self.popular, search.devices[0])
        self.error = error_bound(sliced_terms(queries.shape[1]))
        # One buffer: fresh memory for each anchor costs as much again as the gathering.
        self.gathered = np.empty((2 * self.pool + 1, queries.shape[1]), np.float32)
        self.used = np.zeros(len(queries), bool)
        self.taken = self.used
        self.pools: dict[int, tuple[Integers, Floats]] = {}
        self.anchors: list[int] = []
        self.members: list[list[int]] = []
        self.phases: list[int] = []

    def run(self, phase: int) -> None:
        """Go once over the queries that are still unused."""
        self.taken = np.zeros_like(self.used)
        self.free = self.owners.copy()
        self.any_free = self.free > 0
        self.crowd.reset()
        waiting = np.flatnonzero(~self.used)
        lookahead = LookAhead(self.k, self.crowd.count)
        while len(waiting):
            block = waiting[: lookahead.size(len(waiting))]
            waiting = waiting[len(block) :]
            self._prepare(block)
            wasted = 0
            for row, anchor in enumerate(block.tolist()):
                if self.taken[anchor]:
                    wasted += 1
                    del self.pools[anchor]
                else:
                    self._form(anchor, row, phase)
            lookahead.learn(len(block), wasted)
            waiting = waiting[~self.taken[waiting]]

    def _prepare(self, block: Integers) -> None:
        """The products of a block: pools where they are not known yet, and scores of popular candidates' owners."""
        vectors = torch.from_numpy(take(self.queries, block))
        if block[0] not in self.pools:
            own = None if self.official else self.positives[block]
            size = 2 * self.pool if self.official else self.pool
            found = zip(*self.search.pools(vectors, size, own), strict=True)
            self.pools.update(zip(block.tolist(), found, strict=True))
        self.crowd.score(vectors, ~self.taken if self.official else None)

    def _form(self, anchor: int, row: int, phase: int) -> None:
        """Steps 2 to 5 for one query."""
        candidates, scores = self.pools[anchor]
        free = self.any_free[candidates]
        # In variant `paper` a taken owner is dropped only after it was found the most similar of several.
        able = free if self.official else free | (self.owners[candidates] > 1)
        able &= candidates != self.positives[anchor]
        candidates, scores = candidates[able], scores[able]
        if self.official:
            candidates = self._first(anchor, candidates, scores, self.k if self.labelled else self.pool * phase)
        if not len(candidates):
            return
        places, similarities = self._owners(anchor, row, candidates)
        members = self.by_positive[places]
        if not self.official:
            keep = ~self.taken[members]
            members, similarities = members[keep], similarities[keep]
            if not len(members):
                return
        if not self.labelled:
            members = self._least_similar(anchor, members, similarities)
        del self.pools[anchor]
        self.anchors.append(anchor)
        self.members.append(members.tolist())
        self.phases.append(phase)
        cluster = np.concatenate((members, (anchor,)))
        self.used[cluster] = self.taken[cluster] = True
        # No two queries of a cluster share a positive, so none is named twice.
        positives = self.positives[cluster]
        self.free[positives] -= 1
        self.any_free[positives] = self.free[positives] > 0
        if self.official:
            self.crowd.drop(self.places[cluster])

    def _first(self, anchor: int, candidates: Integers, scores: Floats, count: int) -> Integers:
        """Return the `count` candidates most similar to the anchor; with `labelled` in canonical order, else in any."""
        error = self.search.error
        first, stop = (0, len(candidates)) if len(candidates) <= count else contested_places(scores, count, error)
        if self.labelled:
            first, stop = 0, max(stop, count)
        elif first == stop or len(candidates) <= count:
            return candidates[:count]
        disputed = candidates[first:stop]
        exact = pair_scores(self.queries, np.full(len(disputed), anchor), self.search.candidates, disputed)
        won = disputed[first_in_order(exact, disputed, count - first)]
        return np.concatenate((candidates[:first], won))

    def _owners(self, anchor: int, row: int, candidates: Integers) -> tuple[Integers, Floats]:
        """Step 2: each candidate's owner, as a place in `by_positive`, and its approximate similarity.

        With variant `official`, the owner is one of the free.
        """
        if self.one_to_one:
            places = self.starts[candidates]
            return places, self._gathered(anchor, places)
        popular = self.popular[candidates]
        if popular.all():
            places, scores, near, groups = self.crowd.most_similar(row, candidates)
        elif popular.any():
            places, scores = np.empty(len(candidates), np.int64), np.empty(len(candidates), np.float32)
            for part in (popular, ~popular):
                places[part], scores[part] = self._owners(anchor, row, candidates[part])
            return places, scores
        else:
            places, scores, near, groups = self._most_similar(anchor, candidates)
        if len(near) > len(candidates):
            near = self._settle(anchor, places, near, groups)
        return places[near], scores[near]

    def _most_similar(self, anchor: int, candidates: Integers) -> tuple[Integers, Floats, Integers, Integers]:
        """Return the owners of some candidates with few: see `Crowd.most_similar`."""
        counts = self.owners[candidates]
        groups = np.repeat(np.arange(len(candidates)), counts)
        places = np.repeat(self.starts[candidates] - (np.cumsum(counts) - counts), counts) + np.arange(len(groups))
        if self.official:
            free = ~self.taken[self.by_positive[places]]
            places, groups = places[free], groups[free]
        scores = self._gathered(anchor, places)
        best = np.maximum.reduceat(scores, np.searchsorted(groups, np.arange(len(candidates))))
        near = np.flatnonzero(scores >= (best - 2 * self.error)[groups])
        return places, scores, near, groups[near]

    def _settle(self, anchor: int, places: Integers, near: Integers, groups: Integers) -> Integers:
        """Keep of each group the canonically most similar of those that are within the error of its best."""
        queries = self.by_positive[places[near]]
        exact = np.zeros(len(near), np.float32)
        contested = np.flatnonzero(np.bincount(groups)[groups] > 1)
        exact[contested] = self._exact(anchor, queries[contested])
        order = np.lexsort((queries, -exact, groups))
        return near[order[np.unique(groups[order], return_index=True)[1]]]

    def _gathered(self, anchor: int, places: Integers) -> Floats:
        """Approximate inner products of the anchor with the queries at some places, as by `sliced_product`."""
        rows = take(self.queries, np.concatenate((self.by_positive[places], (anchor,))), self.gathered)
        whole = rows.shape[1] // SLICE * SLICE
        slices = rows[:, :whole].reshape(len(rows), -1, SLICE).transpose(1, 0, 2)
        scores: Floats = (slices[:, :-1] @ slices[:, -1, :, None])[..., 0].sum(axis=0)
        return scores + rows[:-1, whole:] @ rows[-1, whole:]

    def _exact(self, anchor: int, queries: Integers) -> Floats:
        return canonical_scores(take(self.queries, np.array(anchor)), take(self.queries, queries))

    def _least_similar(self, anchor: int, members: Integers, scores: Floats) -> Integers:
        """Step 4: the k least similar, the least first."""
        order = np.argsort(scores)
        ascending = scores[order[: self.k + 1]]
        if len(ascending) == 1 or (ascending[1:] - ascending[:-1]).min() > 2 * self.error:
            return members[order[: self.k]]
        near = members[scores <= ascending[: self.k][-1] + 2 * self.error]
        return near[first_in_order(-self._exact(anchor, near), near, self.k)]

    def fill(self) -> None:
        """Give every query still unused a place: in the first cluster it fits in, or in one of its own."""
        following = list(range(len(self.anchors) + 1))
        for cluster, members in enumerate(self.members):
            if len(members) == self.k:
                following[cluster] = cluster + 1
        # A cluster that is full, or holds a positive, stays so: no query need look at it again for that positive.
        begin: dict[int, int] = {}
        for query in np.flatnonzero(~self.used).tolist():
            positive = int(self.positives[query])
            cluster = _open_from(following, begin.get(positive, 0))
            while cluster < len(self.anchors) and self._holds(cluster, positive):
                cluster = _open_from(following, cluster + 1)
            begin[positive] = cluster + 1
            if cluster == len(self.anchors):
                self.anchors.append(query)
                self.members.append([])
                self.phases.append(2)
                following.append(cluster + 1)
                continue
            self.members[cluster].append(query)
            if len(self.members[cluster]) == self.k:
                following[cluster] = cluster + 1

    def _holds(self, cluster: int, positive: int) -> bool:
        return any(self.positives[query] == positive for query in (self.anchors[cluster], *self.members[cluster]))

    def result(self) -> Clusters:
        """Pad the lists into arrays, and adds the similarities."""
        members = np.full((len(self.anchors), self.k), -1, np.int64)
        for cluster, queries in enumerate(self.members):
            members[cluster, : len(queries)] = queries
        anchors = np.array(self.anchors, np.int64)
        similarities = np.empty(members.shape, np.float32)

        def score(start: int) -> None:
            part = slice(start, start + 8)
            left, right = take(self.queries, anchors[part, None]), take(self.queries, np.maximum(members[part], 0))
            similarities[part] = canonical_scores(left, right)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(score, range(0, len(anchors), 8)))
        similarities[members < 0] = np.nan
        return Clusters(anchors, members, np.array(self.phases, np.int64), similarities)


def _open_from(following: list[int], cluster: int) -> int:
    """Return the first open cluster from one onwards (union-find: `following` of an open one is itself)."""
    while following[cluster] != cluster:
        following[cluster] = following[following[cluster]]
        cluster = following[cluster]
    return cluster
