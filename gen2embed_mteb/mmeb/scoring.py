"""Precision@1 over each row's own candidates, by the official rule and by a strict rule.

Official rule (VLM2Vec and Gen2Embed): a row is a hit if `argmax == 0`, where the first of equal maxima is taken.
Candidate 0 is the positive, so every tie counts for the model, and a model whose vectors are all equal scores 100 %.
Strict rule: a tie counts as a miss; a row is a hit if candidate 0 scores higher than every *other* candidate. A
candidate that repeats candidate 0 (same text, same images) is a right answer too, and ties for every model; so the
strict rule leaves it out.

Averages (paper, Table V): the average of a meta-task is over its datasets, IND and OOD are over the datasets in and out
of domain, and Overall is over all datasets; each dataset has the same weight, whatever its size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.csls import csls, inner_products
from gen2embed_mteb.evaluation.run import RunSummary
from gen2embed_mteb.mmeb.datasets import META_TASKS, Benchmark, DatasetInfo
from gen2embed_mteb.mmeb.reranking.top_candidates import TopCandidates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowScore:
    """The outcome of one row.

    Attributes:
        rank: The number of candidates that score strictly higher than the positive; 0 is a hit by the official rule.
        strict: Whether the positive scores strictly higher than every other candidate.
        top: The best candidates, if they were asked for.
    """

    rank: int
    strict: bool
    top: TopCandidates | None = field(default=None, compare=False, repr=False)


def score_row(
    query: npt.NDArray[np.float32],
    candidates: npt.NDArray[np.float32],
    same_as_positive: npt.NDArray[np.bool_] | None = None,
    hubs: npt.NDArray[np.float64] | None = None,
    *,
    numbers: npt.NDArray[np.int64] | None = None,
    top_k: int | None = None,
) -> RowScore:
    """Score one query against its candidates.

    Args:
        query: (d,) float32, unit length.
        candidates: (n, d) float32, unit rows, n >= 1; row 0 is the positive.
        same_as_positive: (n,) bool, true for each candidate that is the same input as candidate 0; None if there is no
            other such candidate.
        hubs: (n,) float64, what `csls.hubness` returned for the candidates: the score is CSLS. None: the cosine.
        numbers: (n,) int64, equal for equal candidates; only for `top_k`.
        top_k: How many of the best candidates are returned; None: none.

    Returns:
        The rank of the positive and the strict outcome.

    Raises:
        ValueError: The shapes do not fit.
    """
    if candidates.ndim != 2 or not len(candidates) or query.shape != candidates.shape[1:]:
        raise Gen2EmbedError(
            f"query {query.shape} and candidates {candidates.shape} do not fit: expected (d,) and (n, d)"
        )
    scores: npt.NDArray[Any] = inner_products(candidates, query)
    if hubs is not None:
        scores = csls(scores, hubs)
    top = None if top_k is None else TopCandidates.of(scores, numbers, top_k)
    return row_score(scores, same_as_positive, top)


def row_score(
    scores: npt.NDArray[Any], same_as_positive: npt.NDArray[np.bool_] | None = None, top: TopCandidates | None = None
) -> RowScore:
    """Return the outcome of a row from the scores of its candidates.

    Args:
        scores: (n,) of any floating type, n >= 1; that of the positive is first.
        same_as_positive: As in `score_row`.
        top: The best candidates, if they were asked for.
    """
    others = np.ones(len(scores), bool)
    others[0] = False
    if same_as_positive is not None:
        others &= ~same_as_positive
    return RowScore(int((scores > scores[0]).sum()), not bool((scores[others] >= scores[0]).any()), top)


@dataclass(frozen=True)
class DatasetScore:
    """The outcome of one dataset.

    Attributes:
        dataset: The dataset.
        rows: One score per scored row, in order.
        num_errors: The number of rows that were set aside.
        num_unlabelled: The number of the dataset's own inputs that a calibration or CSLS used.
    """

    dataset: DatasetInfo
    rows: tuple[RowScore, ...]
    num_errors: int = 0
    num_unlabelled: int = 0

    @property
    def num_correct(self) -> int:
        """The number of hits by the official rule."""
        return sum(row.rank == 0 for row in self.rows)

    @property
    def precision_at_1(self) -> float | None:
        """Precision@1 by the official rule, in [0, 1], over the scored rows; None if there are none."""
        return self.num_correct / len(self.rows) if self.rows else None

    @property
    def precision_at_1_strict(self) -> float | None:
        """Precision@1 by the strict rule, in [0, 1], over the scored rows; None if there are none."""
        return sum(row.strict for row in self.rows) / len(self.rows) if self.rows else None


@dataclass(frozen=True)
class DatasetReranking:
    """What reranking did to one dataset.

    Attributes:
        before: The outcome by the embedding, of the rows that were reranked.
        after: The outcome of the same rows after reranking, and the number of rows that were set aside.
        num_pairs: How many candidates were scored.
        answers: How many answers were read (see `reranking.health`).
        mass: The sum over them of the probability of the two options together.
        first: In how many the first option was the more probable one.
        num_tokens: How many tokens went through the model.
        num_tokens_in_full: How many would have, without the query's part being computed once.
        seconds: The time that this took, in this run and in those that it goes on from.
        skipped: Why nothing was reranked; else empty.
    """

    before: DatasetScore
    after: DatasetScore
    num_pairs: int = 0
    answers: int = 0
    mass: float = 0.0
    first: int = 0
    num_tokens: int = 0
    num_tokens_in_full: int = 0
    seconds: float = 0.0
    skipped: str = ""


def dataset_figures(score: DatasetScore) -> dict[str, float | int | None]:
    """Return what every report says of a dataset: both figures in [0, 1], None without a scored row; and the counts."""
    return {
        "precision_at_1": score.precision_at_1,
        "precision_at_1_strict": score.precision_at_1_strict,
        "num_queries": len(score.rows),
        "num_errors": score.num_errors,
    }


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(RunSummary):
    """The outcome of a run.

    Attributes:
        benchmark: The benchmark that was run, with the chosen datasets only.
        scores: One score per dataset, in order.
        reranked: One per dataset where the best candidates were reranked; else empty.
    """

    benchmark: Benchmark
    scores: tuple[DatasetScore, ...]
    reranked: tuple[DatasetReranking, ...] = ()


@dataclass(frozen=True)
class Averages:
    """Averages over datasets, in [0, 1]; None if there is nothing to average.

    Attributes:
        meta_tasks: The average of each meta-task that occurs, in the paper's order.
        ind: The average over the in-domain datasets.
        ood: The average over the out-of-domain datasets.
        overall: The average over all datasets.
    """

    meta_tasks: dict[str, float | None]
    ind: float | None
    ood: float | None
    overall: float | None


def average(scores: Sequence[DatasetScore], *, strict: bool = False) -> Averages:
    """Average scores as the paper's Table V does; works with any part of the datasets.

    Args:
        scores: One score per dataset.
        strict: Whether to average the figures of the strict rule instead of the official one.

    Returns:
        The averages; datasets without a scored row are left out.
    """
    return average_figures(
        [(item.dataset, item.precision_at_1_strict if strict else item.precision_at_1) for item in scores]
    )


def average_figures(figures: Sequence[tuple[DatasetInfo, float | None]]) -> Averages:
    """Average figures of datasets as the paper's Table V does.

    Args:
        figures: One figure per dataset, in [0, 1]; None if no row was scored.

    Returns:
        The averages; datasets without a figure are left out.
    """
    return Averages(
        meta_tasks={
            task: _mean(figure for dataset, figure in figures if dataset.meta_task == task)
            for task in META_TASKS
            if any(dataset.meta_task == task for dataset, _ in figures)
        },
        ind=_mean(figure for dataset, figure in figures if dataset.in_domain),
        ood=_mean(figure for dataset, figure in figures if not dataset.in_domain),
        overall=_mean(figure for _, figure in figures),
    )


def _mean(figures: Iterable[float | None]) -> float | None:
    present = [figure for figure in figures if figure is not None]
    return sum(present) / len(present) if present else None


def warn_about_ties(score: DatasetScore) -> bool:
    """Log a warning if rows of a dataset are hits only because of a tie with the positive.

    Args:
        score: The dataset's score.

    Returns:
        Whether the official and the strict figure differ.
    """
    tied = score.num_correct - sum(row.strict for row in score.rows)
    if tied:
        logger.warning(
            "%s: %d of %d rows are hits only because a tie counts for the model (official rule); "
            "compare precision_at_1_strict, and check the model if there are many: equal vectors tie everywhere",
            score.dataset.name,
            tied,
            len(score.rows),
        )
    return bool(tied)


RANKING_CUTOFFS = (1, 5, 10)
RANKING_METRICS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")


def ranking_metrics(score: DatasetScore) -> dict[str, Any]:
    """Return the figures that VLM2Vec's V2 evaluation reports for a dataset, under its own keys.

    Every row has one relevant candidate, so each figure is a function of its rank: if the rank is below the cutoff k,
    hit and recall are 1, precision is 1/k, both forms of nDCG are 1/log2(rank + 2), and MAP and MRR are 1/(rank + 1).

    Args:
        score: The dataset's score.

    Returns:
        `hit@k`, `ndcg_linear@k`, `ndcg_exponential@k`, `precision@k`, `recall@k`, `f1@k`, `map@k`, `mrr@k` for k in
        `RANKING_CUTOFFS`, then `num_pred` and `num_data`; 0.0 if no row was scored, as in VLM2Vec.
    """
    ranks = np.array([row.rank for row in score.rows], dtype=np.int64)
    figures: dict[str, Any] = {}
    for name in RANKING_METRICS:
        for k in RANKING_CUTOFFS:
            gains = np.where(ranks < k, _gain(name, k, ranks), 0.0)
            figures[f"{name}@{k}"] = float(gains.mean()) if len(ranks) else 0.0
    return {**figures, "num_pred": len(ranks), "num_data": len(ranks)}


def _gain(name: str, k: int, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return a figure for rows whose relevant candidate has these ranks, all within the cutoff."""
    if name.startswith("ndcg"):
        return np.asarray(1 / np.log2(ranks + 2), np.float64)
    if name in ("map", "mrr"):
        return np.asarray(1 / (ranks + 1), np.float64)
    # f1 is the harmonic mean of the precision 1/k and the recall 1
    return np.full(len(ranks), {"precision": 1 / k, "f1": 2 / (k + 1)}.get(name, 1.0))
