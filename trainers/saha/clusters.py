"""Algorithm 1 (paper, Sec. III-C): clusters of queries that are each other's hard negatives, and not their positives.

For each query q in dataset order that is not yet used:

1. The pool is the m k candidates most similar to q, without q's own positive.
2. The owner of a candidate is the query most similar to q among those whose positive the candidate is.
3. Owners that are already taken are dropped: in phase 1 the queries of any cluster, in phase 2 those of a cluster of
   phase 2.
4. Of the owners that are left, the k least similar to q become members: with their own positives, they are q's hard
   negatives.
5. q and its members are marked as used.

Phase 1 goes over all queries. Phase 2 goes over those that are still unused, and members of phase 1 may come again in
it. A query that has no owner left forms no cluster: phase 1 leaves it to phase 2. What phase 2 leaves is put into
clusters with room at the end (variant `paper`, see `fillers.py`) or is lost (variant `official`).

Only steps 3 to 5 depend on the order of the queries, and only they are run one query at a time. The pools of the next
block of unused queries are searched together, in one matrix product. A query of the block that an earlier one uses up
is skipped, so its search was wasted; the block's size is chosen so that this happens seldom. The pools of queries that
form no cluster in phase 1 are kept for phase 2, which therefore searches nothing. The owners of popular candidates,
those with many owners (such as labels), are also compared in one product per block; rows are gathered one anchor at a
time only for candidates with few owners.

Time: every query is searched at most once, which costs M d multiplications; a query that a cluster uses up before its
block comes is never searched. For each anchor, the rows that own the candidates of its pool are gathered and
multiplied, and its row is multiplied with those of all owners of popular candidates.

Memory above the vectors: the search's own (see `search.py`), the pools that are kept for phase 2 (at most 12 bytes per
candidate of a pool), a float32 copy of the rows that own popular candidates if it takes 256 MB or less, and a block of
scores against them of 128 MB or less: under 1 GB for 100,000 pairs at d = 1536, k = 7, m = 6.
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
from trainers.saha.fillers import place_fillers
from trainers.saha.owner_scores import Crowd, LookAhead
from trainers.saha.positives import KnownPositives
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
from trainers.saha.search_protocol import Search

Variant = Literal["paper", "official"]

# A candidate with no more owners than this is never popular.
_POPULAR = 8


@dataclass(frozen=True)
class Clusters:
    """The result of Algorithm 1: C clusters, each an anchor query and up to k members, which are queries too.

    Attributes:
        anchors: (C,) int64 queries, in the order in which their clusters were formed.
        members: (C, k) int64 queries as step 4 ranks them, the one least similar to the anchor first (`labelled` and
            `official`: the one whose positive is most similar first); then fillers; -1 where a cluster is short.
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
    more_positives: Sequence[Sequence[int]] | None = None,
    backend: Backend = "auto",
    devices: Sequence[str] | None = None,
    tile: int = TILE,
    search: Search | None = None,
) -> Clusters:
    """Mine clusters of hard negatives; the result depends on the first seven arguments and `more_positives` alone.

    Two candidates, or two owners, are compared by their inner products with the anchor (`canonical_scores`: exact,
    rounded to float32); of two with equal products, the one with the smaller index comes first.

    Fillers are the queries that both phases of variant `paper` leave over. In dataset order, each joins the first
    cluster, in order of formation, that has room and holds no query with the same positive; it is put behind the
    cluster's members. A filler that fits nowhere becomes a cluster of its own, at the end, which others can join.

    Args:
        query_embeddings: (N, d) unit vectors, float16, bfloat16, float32 or float64; NumPy or torch.
        candidate_embeddings: (M, d) unit vectors of the distinct candidates, made by the same model.
        positives: (N,) The positive of each query, as a row of `candidate_embeddings`. Several queries can have the
            same positive, and a candidate need not be a positive of any query.
        num_hard_negatives: k, the number of members per cluster.
        pool_multiplier: m; the pool holds m k candidates.
        variant: `paper`, or `official` for what the official code does instead. The official code fetches 2 m k
            candidates and drops the query's own positive afterwards. In their order, it keeps the first m k (in phase
            2: all) that still have a free owner, and takes the most similar of the free owners: taken owners are
            dropped before step 2 and not after it. A query with no free owner in phase 2 is lost.
        labelled: Whether the candidates are class labels (method: ImageNet_1K and its like). Step 4 of `official` then
            keeps the order of retrieval: the owners of the k candidates most similar to q. `paper` knows no difference.
        more_positives: Further positives of each query, N lists (`positives.py`); variant `official` takes none.
        backend: See `ExactSearch`; changes the speed only.
        devices: See `ExactSearch`; changes the speed only.
        tile: See `ExactSearch`; changes the speed and the memory only.
        search: An opened search over the candidates; it can be approximate. None opens an exact one.

    Returns:
        The clusters. No cluster holds a query twice, or two queries that share a positive. Those of phase 1 are
        disjoint, fillers included. With variant `paper` every query is in at least one cluster.

    Raises:
        ValueError: Wrong input; the message names the first offending index.
    """
    if variant not in get_args(Variant):
        raise Gen2EmbedError(f"variant is {variant!r}; give 'paper' or 'official'")
    for name, value in (("num_hard_negatives", num_hard_negatives), ("pool_multiplier", pool_multiplier)):
        if value < 1:
            raise Gen2EmbedError(f"{name} is {value}; give 1 or more")
    queries = check_unit_rows(query_embeddings, "query_embeddings")
    search = search or ExactSearch(candidate_embeddings, backend=backend, devices=devices, tile=tile)
    if queries.shape[1] != search.candidates.shape[1]:
        raise Gen2EmbedError(
            f"query_embeddings are {queries.shape[1]} wide and candidate_embeddings {search.candidates.shape[1]}; "
            "embed both with one model"
        )
    owned = KnownPositives(positives, more_positives, len(queries), len(search.candidates), several=variant == "paper")
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


class _Miner:
    """The state of the greedy pass over the queries.

    `by_positive` lists all queries sorted by their positive, then by index: the owners of candidate c are
    `by_positive[starts[c] : starts[c] + owners[c]]`. A "place" below is an index into that list, so it means a query.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        search: Search,
        known: KnownPositives,
        *,
        k: int,
        multiplier: int,
        official: bool,
        labelled: bool,
    ) -> None:
        self.queries = queries
        self.search = search
        self.known = known
        self.positives = known.first
        self.k = k
        self.official = official
        self.labelled = labelled and self.official
        self.pool = multiplier * k
        self.owners = np.bincount(known.candidates, minlength=len(search.candidates))
        self.one_to_one = bool(self.owners.max() == 1)
        self.starts = np.cumsum(self.owners) - self.owners
        self.by_positive = known.by_positive
        self.places = np.argsort(self.by_positive)
        # To gather a row costs about as much as to multiply twelve; an anchor gathers the owners of `pool` candidates.
        self.popular = self.owners > max(_POPULAR, len(queries) // (12 * self.pool))
        self.crowd = Crowd(queries, known.candidates, self.by_positive, self.popular, search.devices[0])
        self.error = error_bound(sliced_terms(queries.shape[1]))
        # One buffer for all anchors: new memory for each anchor would double the cost of gathering.
        self.gathered = np.empty((2 * self.pool + 1, queries.shape[1]), np.float32)
        self.used = np.zeros(len(queries), bool)
        self.taken = self.used
        self.pools: dict[int, tuple[Integers, Floats]] = {}
        self.anchors: list[int] = []
        self.members: list[list[int]] = []
        self.phases: list[int] = []

    def run(self, phase: int) -> None:
        """Go once over the queries that are still unused, and form clusters."""
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
        """Compute a block's products: pools that are not known yet, and scores of the owners of popular candidates."""
        vectors = torch.from_numpy(take(self.queries, block))
        if block[0] not in self.pools:
            own = None if self.official else self.positives[block]
            # Positives beyond the first are dropped after the search.
            size = 2 * self.pool if self.official else self.pool + self.known.most - 1
            found = zip(*self.search.pools(vectors, size, own), strict=True)
            self.pools.update(zip(block.tolist(), found, strict=True))
        self.crowd.score(vectors, ~self.taken if self.official else None)

    def _form(self, anchor: int, row: int, phase: int) -> None:
        """Do steps 2 to 5 for one query."""
        candidates, scores = self.pools[anchor]
        if self.known.sets is not None:
            others = self.known.without(anchor, candidates)
            candidates = self._first(anchor, candidates[others], scores[others], self.pool)
            scores = scores[: len(candidates)]  # not used further on
        free = self.any_free[candidates]
        # Variant `paper` drops a taken owner after step 2, so a candidate with several owners must be looked at.
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
        if self.known.sets is not None:
            members = self._disjoint(anchor, members)
        if not len(members):
            return
        if self.known.sets is None and not self.labelled:
            members = self._least_similar(anchor, members, similarities)
        del self.pools[anchor]
        self.anchors.append(anchor)
        self.members.append(members.tolist())
        self.phases.append(phase)
        cluster = np.concatenate((members, (anchor,)))
        self.used[cluster] = self.taken[cluster] = True
        # No two queries of a cluster share a positive, so no index is repeated here.
        positives = self.known.of(cluster)
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
        """Do step 2: return each candidate's owner, as a place in `by_positive`, and its approximate similarity.

        With variant `official`, only free queries can be owners.
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
        """Return what `Crowd.most_similar` returns, for candidates with few owners."""
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
        """Keep, of each group's queries that are within the error of its best, the canonically most similar."""
        queries = self.by_positive[places[near]]
        exact = np.zeros(len(near), np.float32)
        contested = np.flatnonzero(np.bincount(groups)[groups] > 1)
        exact[contested] = self._exact(anchor, queries[contested])
        order = np.lexsort((queries, -exact, groups))
        return near[order[np.unique(groups[order], return_index=True)[1]]]

    def _gathered(self, anchor: int, places: Integers) -> Floats:
        """Return approximate inner products of the anchor and the queries at some places, as by `sliced_product`."""
        rows = take(self.queries, np.concatenate((self.by_positive[places], (anchor,))), self.gathered)
        whole = rows.shape[1] // SLICE * SLICE
        slices = rows[:, :whole].reshape(len(rows), -1, SLICE).transpose(1, 0, 2)
        scores: Floats = (slices[:, :-1] @ slices[:, -1, :, None])[..., 0].sum(axis=0)
        return scores + rows[:-1, whole:] @ rows[-1, whole:]

    def _exact(self, anchor: int, queries: Integers) -> Floats:
        return canonical_scores(take(self.queries, np.array(anchor)), take(self.queries, queries))

    def _least_similar(self, anchor: int, members: Integers, scores: Floats) -> Integers:
        """Do step 4: return the k members least similar to the anchor, the least similar first."""
        order = np.argsort(scores)
        ascending = scores[order[: self.k + 1]]
        if len(ascending) == 1 or (ascending[1:] - ascending[:-1]).min() > 2 * self.error:
            return members[order[: self.k]]
        near = members[scores <= ascending[: self.k][-1] + 2 * self.error]
        return near[first_in_order(-self._exact(anchor, near), near, self.k)]

    def _disjoint(self, anchor: int, members: Integers) -> Integers:
        """Do step 4 where queries have several positives; see `KnownPositives.disjoint`."""
        members = np.unique(members)
        order = first_in_order(-self._exact(anchor, members), members, len(members))
        return np.array(self.known.disjoint(anchor, members[order].tolist(), self.k), np.int64)

    def fill(self) -> None:
        """Give every query that is still unused a place; see `place_fillers`."""
        place_fillers(
            np.flatnonzero(~self.used).tolist(),
            self.positives,
            self.k,
            sets=self.known.sets,
            anchors=self.anchors,
            members=self.members,
            phases=self.phases,
        )

    def result(self) -> Clusters:
        """Pad the lists into arrays, and add the similarities."""
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
