"""Exact inner-product search over unit vectors: the same answer from every backend, tile size and number of threads.

The order that a float32 product gives to two almost equal candidates depends on rounding (see `scores.py`). The search
removes this dependence in three steps:

1. Approximate scores come from one product per tile of candidates. Every candidate is kept whose score is at least the
   k-th best minus twice the largest error that such a product can have (`error_bound`, which is proven): whatever the
   rounding, the true first k are among them.
2. Where the k-th place is contested within that error, the candidates in question are scored again, canonically:
   `canonical_scores` gives the same float32 for the same two vectors in every call.
3. The order is by canonical score, equal scores by the smaller index.

Time: n M d multiplications for n queries, in one pass over all M candidates per block of 512 queries. Canonical
scores add about k pairs per query in `top_k`, and only the contested pairs in `pools`. No index is built.

Memory above the vectors, for a block of up to 512 queries: 512 x tile float32 scores (8 MB at 4,096), a float32 copy
of one tile where the vectors are in half precision (25 MB at d = 1536), and what step 1 keeps: about 20 bytes per
candidate, and k candidates per query unless there are many ties. With millions of ties (copies of one vector) the block
is halved until no more than `MAX_FOUND` candidates are kept, so that the total stays under 400 MB at d = 1536.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.saha.scores import (
    TILE,
    Floats,
    Integers,
    Vectors,
    aligned,
    check_unit_rows,
    contested_places,
    error_bound,
    first_in_order,
    full_precision,
    on_device,
    pair_scores,
    sliced_product,
    sliced_terms,
)

Backend = Literal["auto", "faiss", "torch"]

BLOCK = 512
MAX_FOUND = 4_000_000  # candidates kept per block, over all its queries; 80 MB

_GROUPS = 512
_SLACK = 32


@dataclass(frozen=True)
class _Found:
    """The candidates that step 1 keeps: parallel arrays of query row, candidate and approximate score."""

    rows: Integers
    columns: Integers
    scores: Floats

    def where(self, keep: npt.NDArray[np.bool_] | Integers) -> _Found:
        """Return the entries that a mask keeps, or all of them in a given order."""
        return _Found(self.rows[keep], self.columns[keep], self.scores[keep])


class ExactSearch:
    """Finds the k candidates most similar to each query.

    Args:
        candidates: (M, d) Unit vectors, float16, bfloat16, float32 or float64 (rounded to float32), NumPy or torch.
        backend: `faiss`, `torch`, or `auto`, which is torch: all give identical results, and torch was the fastest on
            the CPU (benchmarks/mining.py) and needs no other package for GPUs. FAISS uses GPUs if built for them.
        devices: Where to search, for instance `["cuda:0", "cuda:1"]`: each takes an equal share of the candidates.
            Default: every GPU there is, or the CPU if there is none.
        tile: How many candidates are scored at a time.

    Raises:
        ValueError: The candidates are not unit vectors, the backend is unknown, or the tile is under 1.
        ImportError: FAISS is asked for and not installed, or has not the GPU support that the devices need.
    """

    def __init__(
        self,
        candidates: Vectors,
        *,
        backend: Backend = "auto",
        devices: Sequence[str] | None = None,
        tile: int = TILE,
    ) -> None:
        """Check the vectors and divide them among the devices."""
        self.candidates = check_unit_rows(candidates, "candidate_embeddings")
        if tile < 1:
            raise Gen2EmbedError(f"tile is {tile}; give how many candidates to score at a time, 1 or more")
        self.devices = [torch.device(name) for name in devices] if devices else _all_devices(self.candidates)
        scan = _choose(backend, self.devices)
        bounds = np.linspace(0, len(self.candidates), len(self.devices) + 1).astype(int)
        self._scans: list[_TorchScan | _FaissScan] = [
            scan(self.candidates[start:stop], int(start), device, tile)
            for device, start, stop in zip(self.devices, bounds[:-1], bounds[1:], strict=True)
            if start < stop
        ]
        self.error = self._scans[0].error

    def top_k(self, queries: Vectors, k: int) -> tuple[Integers, Floats]:
        """Find the k candidates most similar to each query, in order.

        Args:
            queries: (n, d) Unit vectors.
            k: How many; all M where there are fewer.

        Returns:
            Candidates (n, min(k, M)), the best first, ties by the smaller index, and their canonical scores.

        Raises:
            ValueError: The queries are not unit vectors of the candidates' dimension, or k is under 1.
        """
        tensor = self._checked(queries, k)
        k = min(k, len(self.candidates))
        columns, scores = np.empty((len(tensor), k), np.int64), np.empty((len(tensor), k), np.float32)
        with full_precision():
            for start, stop, found in self._blocks(tensor, k):
                counts = np.bincount(found.rows, minlength=stop - start)
                exact = self._canonical(tensor[start:stop], found.rows, found.columns, k)
                order = np.lexsort((found.columns, -exact, found.rows))
                first = (np.cumsum(counts) - counts)[:, None] + np.arange(k)
                columns[start:stop], scores[start:stop] = found.columns[order][first], exact[order][first]
        return columns, scores

    def pools(self, queries: Vectors, k: int, exclude: Integers | None = None) -> tuple[list[Integers], list[Floats]]:
        """Find the same candidates as `top_k`, but score canonically only where the k-th place is contested.

        Args:
            queries: (n, d) Unit vectors.
            k: How many; all candidates where there are fewer.
            exclude: (n,) One candidate per query that is left out.

        Returns:
            For each query the exact set of its first k, and approximate scores (within `error` of the canonical ones),
            descending. Two candidates whose scores differ by less than twice `error` may be in either order.
        """
        tensor = self._checked(queries, k)
        columns: list[Integers] = []
        scores: list[Floats] = []
        with full_precision():
            for start, stop, found in self._blocks(tensor, k if exclude is None else k + 1):
                kept = found if exclude is None else found.where(exclude[start:stop][found.rows] != found.columns)
                self._settle(tensor[start:stop], kept, k, columns, scores)
        return columns, scores

    def _checked(self, queries: Vectors, k: int) -> torch.Tensor:
        tensor = check_unit_rows(queries, "queries")
        if tensor.shape[1] != self.candidates.shape[1]:
            raise Gen2EmbedError(
                f"queries are {tensor.shape[1]} wide and candidates {self.candidates.shape[1]}; "
                "embed both with one model"
            )
        if k < 1:
            raise Gen2EmbedError(f"k is {k}; ask for 1 candidate or more")
        return tensor

    def _blocks(self, queries: torch.Tensor, k: int) -> Iterator[tuple[int, int, _Found]]:
        start, size = 0, BLOCK
        while start < len(queries):
            stop = min(start + size, len(queries))
            try:
                found = self._scan_all(queries[start:stop], k)
            except _TooManyFoundError:
                size = max(1, (stop - start) // 2)
                continue
            yield start, stop, found
            start = stop

    def _scan_all(self, queries: torch.Tensor, k: int) -> _Found:
        if len(self._scans) == 1:
            return self._scans[0](queries, k)
        with ThreadPoolExecutor(len(self._scans)) as pool:
            parts = list(
                pool.map(_in_full_precision, self._scans, [queries] * len(self._scans), [k] * len(self._scans))
            )
        return _merge(parts, len(queries), k, self.error)

    def _canonical(self, queries: torch.Tensor, rows: Integers, columns: Integers, expected: int = 0) -> Floats:
        """Score pairs; if there are many more than expected, there are copies among them, and one of each is scored."""
        if len(columns) <= (expected + _SLACK) * len(queries):
            return pair_scores(queries, rows, self.candidates, columns)
        pairs, inverse = np.unique(rows * len(self.candidates) + self._first_copy[columns], return_inverse=True)
        rows, columns = np.divmod(pairs, len(self.candidates))
        return pair_scores(queries, rows, self.candidates, columns)[inverse]

    @cached_property
    def _first_copy(self) -> Integers:
        """(M,) For each candidate, the first one with the same vector."""
        first: dict[bytes, int] = {}
        copies: list[int] = []
        for start in range(0, len(self.candidates), TILE):
            for row in self.candidates[start : start + TILE].float().cpu().numpy():
                copies.append(first.setdefault(blake2b(row.tobytes(), digest_size=16).digest(), len(copies)))
        return np.array(copies, np.int64)

    def _settle(
        self, queries: torch.Tensor, found: _Found, k: int, columns: list[Integers], scores: list[Floats]
    ) -> None:
        """Sort what step 1 kept, cut it to k (contested places by canonical score), and append it to the two lists."""
        order = np.lexsort((-found.scores, found.rows))
        found = found.where(order)
        ends = np.cumsum(np.bincount(found.rows, minlength=len(queries)))
        starts = np.concatenate(([0], ends[:-1]))
        contested: list[tuple[int, slice, int]] = []
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            columns.append(found.columns[start:end])
            scores.append(found.scores[start:end])
            if end - start <= k:
                continue
            first, stop = contested_places(scores[-1], k, self.error)
            if first == stop:
                columns[-1], scores[-1] = columns[-1][:k], scores[-1][:k]
            else:
                contested.append((row, slice(first, stop), k - first))
        if not contested:
            return
        base = len(columns) - len(queries)
        disputed = [columns[base + row][window] for row, window, _ in contested]
        sizes = [len(part) for part in disputed]
        rows = np.repeat([row for row, _, _ in contested], sizes)
        exact = np.split(self._canonical(queries, rows, np.concatenate(disputed)), np.cumsum(sizes)[:-1])
        for (row, window, places), part, value in zip(contested, disputed, exact, strict=True):
            won = np.sort(first_in_order(value, part, places)) + window.start
            kept = np.concatenate((np.arange(window.start), won))
            columns[base + row], scores[base + row] = columns[base + row][kept], scores[base + row][kept]


class _TooManyFoundError(Exception):
    """Raised when step 1 keeps more than `MAX_FOUND` candidates, because of ties: the block must be made smaller."""


def _in_full_precision(scan: _TorchScan | _FaissScan, queries: torch.Tensor, k: int) -> _Found:
    """Run a scan in a thread of its own, which must set inference mode and autocast for itself."""
    with full_precision():
        return scan(queries, k)


def _all_devices(candidates: torch.Tensor) -> list[torch.device]:
    if candidates.device.type != "cpu" or not torch.cuda.is_available():
        return [candidates.device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _choose(backend: str, devices: list[torch.device]) -> type[_TorchScan | _FaissScan]:
    if backend in {"auto", "torch"}:
        return _TorchScan
    if backend != "faiss":
        raise Gen2EmbedError(f"backend is {backend!r}; give 'auto', 'faiss' or 'torch'")
    if importlib.util.find_spec("faiss") is None:
        raise ImportError("faiss is not installed: pip install 'gen2embed[cpu]' (or [gpu]), or use backend='torch'")
    import faiss

    if any(device.type == "cuda" for device in devices) and not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this faiss has no GPU support: pip install 'gen2embed[gpu]', or use backend='torch'")
    return _FaissScan


def _kth_best(rows: Integers, scores: Floats, count: int, k: int) -> Floats:
    """Return the k-th best score of each of `count` rows; minus infinity where a row has fewer than k."""
    ordered = scores[np.lexsort((-scores, rows))]
    counts = np.bincount(rows, minlength=count)
    last = np.cumsum(counts) - counts + k - 1
    return np.where(counts >= k, ordered[np.minimum(last, len(ordered) - 1)], np.float32(-np.inf))


def _merge(parts: Sequence[_Found], count: int, k: int, error: float) -> _Found:
    """Join what several scans kept, and drop what the others' scores rule out."""
    rows = np.concatenate([part.rows for part in parts])
    columns = np.concatenate([part.columns for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    return _Found(rows, columns, scores).where(scores >= (_kth_best(rows, scores, count, k) - 2 * error)[rows])


class _TorchScan:
    """Step 1 with torch, on one device.

    The candidates of a tile are divided into groups, and the maximum of each group is computed in one pass. The k-th
    best of these maxima is never above the k-th best of all scores (k groups have a score that high), and with several
    times k groups it is close to it. It is used as the threshold: only groups whose maximum reaches it are searched.
    """

    def __init__(self, candidates: torch.Tensor, offset: int, device: torch.device, tile: int) -> None:
        self.candidates = on_device(candidates, device)
        self.offset = offset
        self.device = device
        self.tile = tile
        self.error = error_bound(sliced_terms(candidates.shape[1]))

    def __call__(self, queries: torch.Tensor, k: int) -> _Found:
        """Return all candidates of this share that can be among the first k."""
        queries = queries.to(self.device).float()
        k = min(k, len(self.candidates))
        groups = min(max(_GROUPS, 4 * k), len(self.candidates))
        room = aligned(min(self.tile, len(self.candidates)), len(queries), self.device)
        best = torch.full((groups, len(queries)), -torch.inf, device=self.device)
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        total = 0
        for start in range(0, len(self.candidates), self.tile):
            part = self.candidates[start : start + self.tile].to(self.device).float()
            scores = sliced_product(part, queries, room[: len(part)])
            width = min(groups, len(part))
            offsets = torch.arange(0, len(part), width, device=self.device)
            maxima = scores[:width].clone()
            for left in range(width, len(part), width):
                piece = scores[left : left + width]
                torch.maximum(maxima[: len(piece)], piece, out=maxima[: len(piece)])
            # Any place in `best` is right, as each candidate counts once; small tiles use different places in turn.
            place = min(start % groups, groups - width)
            torch.maximum(best[place : place + width], maxima, out=best[place : place + width])
            threshold = _kth_largest(best, k) - 2 * self.error
            group, rows = (maxima >= threshold).nonzero(as_tuple=True)
            column = group[:, None] + offsets
            value = scores[column.clamp(max=len(part) - 1), rows[:, None]]
            at, nth = ((value >= threshold[rows, None]) & (column < len(part))).nonzero(as_tuple=True)
            found.append((rows[at], column[at, nth] + start + self.offset, value[at, nth]))
            total += len(at)
            if total > MAX_FOUND and len(queries) > 1:
                raise _TooManyFoundError
        rows, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        keep = values >= threshold[rows]
        return _Found(rows[keep].cpu().numpy(), columns[keep].cpu().numpy(), values[keep].cpu().numpy())


def _kth_largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th largest score of each column."""
    if scores.device.type != "cpu":
        return scores.topk(k, dim=0, sorted=False).values.amin(0)
    # On a CPU, NumPy's partition is six times as fast as torch's `topk`.
    place = len(scores) - k
    return torch.from_numpy(np.partition(np.ascontiguousarray(scores.numpy().T), place, axis=1)[:, place].copy())


class _FaissScan:
    """Step 1 with FAISS, which is asked for k + `_SLACK` candidates from each tile.

    If the last of these is still within the error of the k-th best (many almost equal candidates), FAISS may have left
    some out, and that query is scanned with torch instead.
    """

    def __init__(self, candidates: torch.Tensor, offset: int, device: torch.device, tile: int) -> None:
        import faiss

        self.faiss: Any = faiss
        self.candidates = candidates
        self.offset = offset
        self.device = device
        # FAISS reads the vectors in parts by itself; where they need no conversion, one call takes them all.
        self.tile = len(candidates) if candidates.dtype == torch.float32 and tile == TILE else tile
        self.error = error_bound(candidates.shape[1])
        self.fallback = _TorchScan(candidates, offset, device, tile)
        self.resources = faiss.StandardGpuResources() if device.type == "cuda" else None

    def __call__(self, queries: torch.Tensor, k: int) -> _Found:
        """Return all candidates of this share that can be among the first k."""
        k = min(k, len(self.candidates))
        asked = queries.cpu().float().contiguous().numpy()
        parts: list[_Found] = []
        lowest = np.full(len(asked), -np.inf, np.float32)
        for start in range(0, len(self.candidates), self.tile):
            tile = self.candidates[start : start + self.tile].cpu().float().contiguous().numpy()
            size = min(k + _SLACK, len(tile))
            values, columns = self._knn(asked, tile, size)
            if size < len(tile):
                lowest = np.maximum(lowest, values[:, -1])
            rows = np.repeat(np.arange(len(asked)), size)
            parts.append(_Found(rows, columns.ravel().astype(np.int64) + start + self.offset, values.ravel()))
        merged = _merge(parts, len(asked), k, self.error)
        # A row for which FAISS may have left out a candidate above the k-th best minus the error is scanned again.
        kth = _kth_best(merged.rows, merged.scores, len(asked), k)
        open_rows = np.flatnonzero(lowest >= kth - 2 * self.error)
        if not len(open_rows):
            return merged
        again = self.fallback(queries[torch.from_numpy(open_rows).to(queries.device)], k)
        settled = ~np.isin(merged.rows, open_rows)
        return _Found(
            np.concatenate((merged.rows[settled], open_rows[again.rows])),
            np.concatenate((merged.columns[settled], again.columns)),
            np.concatenate((merged.scores[settled], again.scores)),
        )

    def _knn(self, queries: Floats, candidates: Floats, k: int) -> tuple[Floats, Integers]:
        metric = self.faiss.METRIC_INNER_PRODUCT
        if self.resources is None:
            return self.faiss.knn(queries, candidates, k, metric=metric)
        return self.faiss.knn_gpu(self.resources, queries, candidates, k, metric=metric, device=self.device.index or 0)
