"""Scores the owners of popular candidates with one matrix product per block, and chooses the size of the block.

Many queries can share one positive: a label, an answer. Its owners are then the same rows for every anchor, so
Algorithm 1 multiplies a block of anchors with all of them at once (`Crowd`) instead of gathering them for each anchor.
`LookAhead` chooses how many anchors a block has.

Time per block of B anchors: B d multiplications per owner that is held, and for each anchor one pass over its scores.
The rows of owners are copied again only when 30 % of them have been used up. Memory: one float32 copy of the owners'
rows where it takes `MAX_COPY` bytes or less (otherwise rows are copied tile by tile, for every block), and B scores per
owner, `MAX_SCORES` bytes or less unless a single row of scores takes more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from trainers.saha.scores import TILE, Floats, Integers, error_bound, sliced_product, sliced_terms

MAX_COPY = 256 << 20
MAX_SCORES = 128 << 20

_CHUNK = 256
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 512


class Crowd:
    """The owners of popular candidates, and their scores against a block of anchors, made by one product.

    Attributes:
        count: How many such owners there are.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        candidates: Integers,
        by_positive: Integers,
        popular: npt.NDArray[np.bool_],
        device: torch.device,
    ) -> None:
        self.queries = queries
        self.device = device
        self.by_positive = by_positive
        self.candidates = candidates
        self.places = np.flatnonzero(popular[self.candidates])
        self.count = len(self.places)
        self.error = error_bound(sliced_terms(queries.shape[1]))
        fits = self.count * queries.shape[1] * 4 <= MAX_COPY
        # One buffer for all copies: new memory each time would double the cost of copying.
        self.room = torch.empty((self.count, queries.shape[1]), device=device) if fits else None
        self.column = np.full(len(by_positive), -1, np.int64)
        self.slot = np.full(len(popular), -1, np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget which owners are free."""
        self.held = np.empty(0, np.int64)
        self.copy: torch.Tensor | None = None
        self.scores: Floats = np.empty((0, 0), np.float32)

    def score(self, vectors: torch.Tensor, free: npt.NDArray[np.bool_] | None) -> None:
        """Multiply a block of anchors with the owners.

        Args:
            vectors: (block, d) The vectors of the anchors.
            free: (N,) Which queries can be owners; None for all.
        """
        if not self.count:
            return
        live = self.places if free is None else self.places[free[self.by_positive[self.places]]]
        # Owners are used up as the pass goes on; to copy the rest for every block would cost more than it saves.
        if len(live) < 0.7 * len(self.held) or not len(self.held):
            self._hold(live)
        vectors = vectors.to(self.device)
        if self.copy is not None:
            self.scores = sliced_product(vectors, self.copy).cpu().numpy()
        else:
            starts = range(0, len(self.held), TILE)
            parts = [sliced_product(vectors, self._rows(start, start + TILE)) for start in starts]
            self.scores = torch.cat(parts, dim=1).cpu().numpy()
        if free is not None:
            self.scores[:, ~free[self.by_positive[self.held]]] = -np.inf

    def drop(self, places: Integers) -> None:
        """Take owners out of what remains of the block."""
        if self.count:
            columns = self.column[places]
            self.scores[:, columns[columns >= 0]] = -np.inf

    def most_similar(self, row: int, candidates: Integers) -> tuple[Integers, Floats, Integers, Integers]:
        """Find each candidate's owner most similar to an anchor, and others that are as similar within the error.

        Args:
            row: The anchor's row in the block.
            candidates: (n,) Popular candidates, each with an owner that was not dropped.

        Returns:
            Four arrays. The places and the scores of all owners that are held; `near`: positions in these two, one or
            more per candidate, in the candidates' order; `groups`: for each of `near`, the number of its candidate.
        """
        scores = self.scores[row]
        slots = self.slot[candidates]
        best = np.maximum.reduceat(scores, self.bounds)
        limits = np.full(len(best), np.inf, np.float32)
        limits[slots] = best[slots] - 2 * self.error
        near = np.flatnonzero(scores >= limits[self.group])
        order = np.empty(len(best), np.int64)
        order[slots] = np.arange(len(slots))
        groups = order[self.group[near]]
        arranged = np.argsort(groups, kind="stable")
        return self.held, scores, near[arranged], groups[arranged]

    def _hold(self, places: Integers) -> None:
        self.copy = None
        self.held = places
        self.column[:] = -1
        self.column[places] = np.arange(len(places))
        present, self.bounds, self.group = np.unique(self.candidates[places], return_index=True, return_inverse=True)
        self.slot[present] = np.arange(len(present))
        if self.room is not None:
            self.copy = self.room[: len(places)]
            for start in range(0, len(places), _CHUNK):
                part = self.copy[start : start + _CHUNK]
                part.copy_(self._rows(start, start + len(part)))

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        index = torch.from_numpy(self.by_positive[self.held[start:stop]]).to(self.queries.device)
        return self.queries.index_select(0, index).to(self.device).float()


class LookAhead:
    """Chooses how many unused queries to search ahead: the size B of the next block.

    Each cluster uses up k queries, and any of them may be in the block. If U queries are unused, this wastes a share of
    about k B / 2 U of the block's searches. A product of few rows is slower than one of many, by a share of about 18 /
    B on a CPU. The sum of both shares is least at B = sqrt(36 U / k). Sorted data, in which neighbours are alike,
    wastes more; late in a phase, clusters are small and waste less. Therefore the size is also scaled by the waste that
    was seen.
    """

    def __init__(self, k: int, columns: int) -> None:
        self.k = k
        self.most = min(_LARGEST_BLOCK, max(1, MAX_SCORES // (4 * max(1, columns))))
        self.scale = 1.0

    def size(self, waiting: int) -> int:
        """Return the size of the next block, for a number of unused queries."""
        size = int(self.scale * (36 * waiting / self.k) ** 0.5) // _SMALLEST_BLOCK * _SMALLEST_BLOCK
        return min(self.most, max(_SMALLEST_BLOCK, size))

    def learn(self, size: int, wasted: int) -> None:
        """Adapt the size to how many of a block's queries had been used up when their turn came."""
        if wasted > 0.2 * size:
            self.scale *= 0.7
        elif wasted < 0.06 * size:
            self.scale = min(4.0, 1.4 * self.scale)
