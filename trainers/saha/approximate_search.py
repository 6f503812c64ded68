"""Approximate search with FAISS's inverted lists (IVF), for more candidates than an exact search can afford.

1. k-means divides the candidates into `nlist` lists; a query is compared with those of the `nprobe` nearest lists only.
2. What is found is scored canonically (`scores.py`) and ordered as the exact search orders it. So scores are exact; the
   set is not: candidates in other lists are missed.
3. A query whose lists hold too few candidates is searched exactly.

How many are missed depends on the data, so `recall` compares with the exact search on a sample of the queries. Nothing
here is exact, and everything that is made from it says so.

Time: n M d nprobe / nlist multiplications for n queries and M candidates, n nlist d to choose lists, and k-means once:
10 rounds of at most 256 nlist x nlist d. Memory: a second copy of the candidates in float32. It runs on the CPU.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.saha.scores import Floats, Integers, Vectors, check_unit_rows, error_bound, pair_scores, sliced_terms
from trainers.saha.search import ExactSearch

EXACT = "exact"
POINTS_PER_LIST = 39
"""The fewest candidates per list with which FAISS's k-means is content."""
SEED = 1234
RECALL_QUERIES = 1_000
_FORM = re.compile(r"ivf:([1-9][0-9]{0,8}),([1-9][0-9]{0,8})")
_BLOCK = 4_096


@dataclass(frozen=True)
class IvfSettings:
    """How candidates are divided: into `nlist` lists, of which `nprobe` are searched for each query."""

    nlist: int
    nprobe: int

    @classmethod
    def named(cls, text: str) -> IvfSettings | None:
        """Return the settings that a text such as `ivf:4096,64` stands for; None for `exact`.

        Raises:
            Gen2EmbedError: The text has another form, or more lists would be searched than there are.
        """
        if text == EXACT:
            return None
        found = _FORM.fullmatch(text)
        if found is None:
            raise Gen2EmbedError(f"search is {text!r}; pass exact, or ivf:NLIST,NPROBE such as ivf:4096,64")
        nlist, nprobe = map(int, found.groups())
        if nprobe > nlist:
            raise Gen2EmbedError(f"search is {text!r}: nprobe is at most nlist; with nprobe = nlist pass exact instead")
        return cls(nlist, nprobe)


class Recall(NamedTuple):
    """The share of the k best candidates that an approximate search finds, on a sample of the queries."""

    share: float
    k: int
    num_queries: int


class IvfSearch:
    """Finds most of the k candidates most similar to each query; see `ExactSearch` for the methods.

    Args:
        candidates: (M, d) Unit vectors.
        settings: The lists.

    Raises:
        ValueError: The candidates are not unit vectors, or there are too few of them for so many lists.
        ImportError: FAISS is not installed.
    """

    def __init__(self, candidates: Vectors, settings: IvfSettings) -> None:
        """Divide the candidates into lists."""
        self.candidates = check_unit_rows(candidates, "candidate_embeddings")
        self.devices = [self.candidates.device]
        self.error = error_bound(sliced_terms(self.candidates.shape[1]))
        if len(self.candidates) < POINTS_PER_LIST * settings.nlist:
            raise Gen2EmbedError(
                f"{len(self.candidates)} candidates are too few for {settings.nlist} lists; pass fewer than "
                f"{len(self.candidates) // POINTS_PER_LIST + 1}, or search exactly"
            )
        if importlib.util.find_spec("faiss") is None:
            raise ImportError("faiss is not installed: pip install 'gen2embed[cpu]', or search exactly")
        import faiss

        vectors = self.candidates.cpu().float().contiguous().numpy()
        width = vectors.shape[1]
        # The quantizer is kept: FAISS does not own it.
        self._quantizer = faiss.IndexFlatIP(width)
        self._index = faiss.IndexIVFFlat(self._quantizer, width, settings.nlist, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.seed = SEED
        self._index.train(vectors)
        self._index.add(vectors)
        self._index.nprobe = settings.nprobe

    def top_k(self, queries: Vectors, k: int) -> tuple[Integers, Floats]:
        """Find k candidates for each query, in order.

        Args:
            queries: (n, d) Unit vectors.
            k: How many; all M where there are fewer.

        Returns:
            Candidates (n, min(k, M)), the best first, ties by the smaller index, and their canonical scores.
        """
        columns, scores = self.pools(queries, k)
        return np.stack(columns), np.stack(scores)

    def pools(self, queries: Vectors, k: int, exclude: Integers | None = None) -> tuple[list[Integers], list[Floats]]:
        """Find k candidates for each query, in order; see `ExactSearch.pools`.

        Args:
            queries: (n, d) Unit vectors.
            k: How many; all candidates where there are fewer.
            exclude: (n,) One candidate per query that is left out.
        """
        if k < 1:
            raise Gen2EmbedError(f"k is {k}; ask for 1 candidate or more")
        tensor = check_unit_rows(queries, "queries")
        columns: list[Integers] = []
        scores: list[Floats] = []
        for start in range(0, len(tensor), _BLOCK):
            left_out = None if exclude is None else exclude[start : start + _BLOCK]
            self._block(tensor[start : start + _BLOCK], k, left_out, columns, scores)
        return columns, scores

    def recall(self, queries: Vectors, k: int) -> Recall:
        """Compare with the exact search on at most `RECALL_QUERIES` of the queries, evenly spaced.

        Args:
            queries: (n, d) Unit vectors, n at least 1.
            k: How many candidates.
        """
        tensor = check_unit_rows(queries, "queries")
        chosen = np.unique(np.linspace(0, len(tensor) - 1, min(RECALL_QUERIES, len(tensor))).astype(np.int64))
        sample = tensor[torch.from_numpy(chosen).to(tensor.device)]
        found, _ = self.top_k(sample, k)
        true, _ = self._exact.top_k(sample, k)
        shared = sum(len(np.intersect1d(one, other)) for one, other in zip(found, true, strict=True))
        return Recall(shared / true.size, true.shape[1], len(chosen))

    def _block(
        self, queries: torch.Tensor, k: int, exclude: Integers | None, columns: list[Integers], scores: list[Floats]
    ) -> None:
        most = min(k + (exclude is not None), len(self.candidates))
        wanted = min(k, len(self.candidates) - (exclude is not None))
        _, found = self._index.search(queries.cpu().float().contiguous().numpy(), most)
        for row, places in enumerate(found):
            kept = places[places >= 0].astype(np.int64)
            if exclude is not None:
                kept = kept[kept != exclude[row]]
            if len(kept) < wanted:  # its lists hold too few
                one = None if exclude is None else exclude[row : row + 1]
                kept = self._exact.pools(queries[row : row + 1], k, one)[0][0]
            values = pair_scores(queries, np.full(len(kept), row), self.candidates, kept)
            order = np.lexsort((kept, -values))[:wanted]
            columns.append(kept[order])
            scores.append(values[order])

    @cached_property
    def _exact(self) -> ExactSearch:
        return ExactSearch(self.candidates)
