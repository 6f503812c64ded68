"""Recall at 1, 5 and 10 of images by their captions, and of captions by their image.

A query is found at k if one of its candidates is among the k most similar. An image has up to five captions, and any of
them counts (it is not the share of the five that is found). Official rule: a candidate of others with an equal score
does not push the right one back. Strict rule: it does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.evaluation.csls import csls
from gen2embed_mteb.evaluation.run import RunSummary
from gen2embed_mteb.retrieval.datasets import CaptionDataset
from gen2embed_mteb.sugarcrepe.scoring import CompositionalityResult

CUTS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
_ROWS = 512


@dataclass(frozen=True)
class Ranks:
    """Where the best right candidate of each query stands, from 0.

    Attributes:
        official: (q,) int64, how many candidates of others score higher.
        strict: (q,) int64, how many score as high or higher.
    """

    official: npt.NDArray[np.int64]
    strict: npt.NDArray[np.int64]

    def recall(self, k: int, *, strict: bool = False) -> float | None:
        """Return the share of queries that are found at k, in [0, 1]; None if there are none."""
        ranks = self.strict if strict else self.official
        return float((ranks < k).mean()) if len(ranks) else None


@dataclass(frozen=True)
class DatasetRecall:
    """The outcome of one dataset.

    Attributes:
        dataset: The dataset.
        ranks: The ranks by direction.
        num_images: The number of its images that were scored.
        num_captions: The number of their captions.
        num_errors: The number of rows that were set aside.
        num_unlabelled: By direction, how many of the dataset's own inputs a calibration or CSLS used.
    """

    dataset: CaptionDataset
    ranks: dict[str, Ranks]
    num_images: int
    num_captions: int
    num_errors: int
    num_unlabelled: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RetrievalResult(RunSummary):
    """The outcome of a run.

    Attributes:
        name: The name of the benchmark.
        scores: One outcome per dataset, in order.
        captions: The outcome of SugarCrepe, where it is a part of the run.
    """

    name: str
    scores: tuple[DatasetRecall, ...]
    captions: CompositionalityResult | None = None


def ranks_of(
    queries: npt.NDArray[np.float32],
    candidates: npt.NDArray[np.float32],
    query_images: npt.NDArray[np.int64],
    candidate_images: npt.NDArray[np.int64],
    hubs: npt.NDArray[np.float64] | None = None,
) -> Ranks:
    """Return where the best right candidate of each query stands; right is what belongs to the same image.

    Equal vectors have equal scores wherever they stand: each distinct one is multiplied once.

    Args:
        queries: (q, d) float32 unit rows.
        candidates: (n, d) float32 unit rows.
        query_images: (q,) int64, the image that a query is, or belongs to.
        candidate_images: (n,) int64, likewise; every image of a query has a candidate.
        hubs: (n,) float64, what `csls.hubness` returned for the candidates: the score is CSLS. None: the cosine.
    """
    distinct, first, inverse = np.unique(candidates, axis=0, return_index=True, return_inverse=True)
    official, strict = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    rows, number = np.unique(queries, axis=0, return_inverse=True)
    order = np.argsort(number.reshape(-1), kind="stable")
    for start in range(0, len(queries), _ROWS):
        block = order[start : start + _ROWS]
        needed, place = np.unique(number.reshape(-1)[block], return_inverse=True)
        scores: npt.NDArray[Any] = rows[needed] @ distinct.T
        scores = scores if hubs is None else csls(scores, hubs[first])
        scores = scores[place.reshape(-1)][:, inverse.reshape(-1)]
        right = query_images[block, None] == candidate_images[None]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        official[block] = ((scores > best) & ~right).sum(axis=1)
        strict[block] = ((scores >= best) & ~right).sum(axis=1)
    return Ranks(official, strict)
