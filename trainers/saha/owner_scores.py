"""What makes Algorithm 1's batches pay: popular candidates' owners in one product, and a look-ahead that fits."""

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
    """The owners of popular candidates, scored against a block of anchors in one product.

    Attributes:
        count: How many such owners there are.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        positives: Integers,
        by_positive: Integers,
        popular: npt.NDArray[np.bool_],
        device: torch.device,
    ) -> None:
        self.queries = queries
        self.device = device
        self.by_positive = by_positive
        self.candidates = positives[by_positive]
        self.places = np.flatnonzero(popular[self.candidates])
        self.count = len(self.places)
        self.error = error_bound(sliced_terms(queries.shape[1]))
        fits = self.count * queries.shape[1] * 4 <= MAX_COPY
        # One buffer for all copies: fresh memory costs as much again as the copying.
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
            vectors: (block, d) anchors.
            free: (N,) which queries can be asked for; None for all.
        """
        if not self.count:
            return
        live = self.places if free is None else self.places[free[self.by_positive[self.places]]]
        # Owners are used up as the pass goes on; leaving them out each time would cost more than it saves.
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
        """Find each candidate's owner most similar to an anchor, and others as similar within the error.

        Args:
            row: The anchor's row in the block.
            candidates: (n,) popular candidates with an owner that was not dropped.

        Returns:
            places, scores: of all owners asked for; near: positions in them, one or more a candidate, in the
            candidates' order; groups: for each of `near`, which candidate it belongs to.
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
    """How many unused queries to search ahead.

    Each cluster uses up k queries, any of which may be in the block: of B out of U unused, about k B / 2 U of it. A
    product of few rows is slow, by about 18 / B on a CPU. Their sum is least at B = sqrt(36 U / k). Data in an order
    (neighbours alike) wastes more, and late in a phase clusters are small and waste less, so the size follows what is
    seen.
    """

    def __init__(self, k: int, columns: int) -> None:
        self.k = k
        self.most = min(_LARGEST_BLOCK, max(1, MAX_SCORES // (4 * max(1, columns))))
        self.scale = 1.0

    def size(self, waiting: int) -> int:
        """Return the next block's size, for so many unused queries."""
        size = int(self.scale * (36 * waiting / self.k) ** 0.5) // _SMALLEST_BLOCK * _SMALLEST_BLOCK
        return min(self.most, max(_SMALLEST_BLOCK, size))

    def learn(self, size: int, wasted: int) -> None:
        """Take note of how many of a block's queries had been used up when their turn came."""
        if wasted > 0.2 * size:
            self.scale *= 0.7
        elif wasted < 0.06 * size:
            self.scale = min(4.0, 1.4 * self.scale)
