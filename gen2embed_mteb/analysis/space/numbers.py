"""What a map of points cannot say: how far two clouds of unit vectors are apart, and whether pairs find each other.

All figures are of the vectors themselves, not of their places on a map. A "pair" is a query with its positive; "others"
are all pairs of a query and a candidate that is not one of its positives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Pairs = npt.NDArray[np.int64]

FOLDS = 5
_SEED = 42


@dataclass(frozen=True)
class SpaceNumbers:
    """How queries and candidates lie to each other.

    Attributes:
        num_queries: How many distinct queries there are.
        num_candidates: How many distinct candidates.
        centroid_distance: The distance of the mean query from the mean candidate, in [0, 2].
        pair_cosine: The mean cosine of a query and its positive.
        other_cosine: The mean cosine of a query and a candidate that is not its positive; `None` if there is none.
        cosine_gap: `pair_cosine` less `other_cosine`.
        side_accuracy: How often a linear classifier tells a query from a candidate: the mean over both sides of the
            share that it gets right, in five folds; 0.5 if they cannot be told apart. `None` for fewer than two of a
            side.
        recall_at_1: The share of queries whose nearest candidate is a positive of theirs; a tie counts as a miss.
    """

    num_queries: int
    num_candidates: int
    centroid_distance: float
    pair_cosine: float
    other_cosine: float | None
    cosine_gap: float | None
    side_accuracy: float | None
    recall_at_1: float


def numbers_of(queries: Vectors, candidates: Vectors, pairs: Pairs) -> SpaceNumbers:
    """Return the figures of one dataset.

    Args:
        queries: (n, d) unit rows, one for each distinct query.
        candidates: (m, d) unit rows, one for each distinct candidate.
        pairs: (p, 2) distinct pairs of a query's and its positive's number; every query has one or more.
    """
    scores = queries.astype(np.float64) @ candidates.astype(np.float64).T
    positive = np.zeros(scores.shape, dtype=bool)
    positive[pairs[:, 0], pairs[:, 1]] = True
    pair = float(scores[positive].mean())
    other = float(scores[~positive].mean()) if not positive.all() else None
    best_pair = np.where(positive, scores, -np.inf).max(axis=1)
    best_other = np.where(positive, -np.inf, scores).max(axis=1)
    difference = queries.mean(axis=0, dtype=np.float64) - candidates.mean(axis=0, dtype=np.float64)
    return SpaceNumbers(
        num_queries=len(queries),
        num_candidates=len(candidates),
        centroid_distance=float(np.linalg.norm(difference)),
        pair_cosine=pair,
        other_cosine=other,
        cosine_gap=None if other is None else pair - other,
        side_accuracy=side_accuracy(queries, candidates),
        recall_at_1=float((best_pair > best_other).mean()),
    )


def side_accuracy(queries: Vectors, candidates: Vectors) -> float | None:
    """Return how well a linear classifier tells the two sides apart, in folds; see `SpaceNumbers`.

    Args:
        queries: (n, d) vectors of one side.
        candidates: (m, d) vectors of the other.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fewest = min(len(queries), len(candidates))
    if fewest < 2:
        return None
    vectors = np.concatenate([queries, candidates]).astype(np.float64)
    sides = np.repeat([0, 1], [len(queries), len(candidates)])
    folds = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=_SEED)
    # There may be a thousand queries and nine candidates: both sides weigh the same.
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    found = cross_val_predict(classifier, vectors, sides, cv=folds) == sides
    return float(np.mean([found[sides == side].mean() for side in (0, 1)]))
