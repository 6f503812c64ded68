"""Scores by hand and against a plain recomputation, ties and collapsed models included."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen2embed_mteb.mmeb import DatasetInfo
from gen2embed_mteb.mmeb.scoring import (
    DatasetScore,
    RowScore,
    average,
    ranking_metrics,
    score_row,
    warn_about_ties,
)


def rows(*vectors: tuple[float, ...]) -> np.ndarray:
    return np.array(vectors, dtype=np.float32)


QUERY = np.array([1, 0], dtype=np.float32)


@pytest.mark.parametrize(
    ("candidates", "same", "expected"),
    [
        (rows((1, 0), (0, 1)), None, RowScore(0, True)),
        (rows((0, 1), (1, 0)), None, RowScore(1, False)),
        (rows((1, 0), (1, 0), (0, 1)), None, RowScore(0, False)),  # a tie: a hit officially, not strictly
        (rows((1, 0), (1, 0), (0, 1)), [True, True, False], RowScore(0, True)),  # ... with itself: no tie
        (rows((0, 1), (1, 0), (1, 0), (0, 1)), None, RowScore(2, False)),
        (
            rows(
                (0.6, 0.8),
            ),
            None,
            RowScore(0, True),
        ),  # nothing to be confused with
        (rows((1, 0), (1, 0), (1, 0)), [True, True, False], RowScore(0, False)),  # collapsed
    ],
)
def test_by_hand(candidates: np.ndarray, same: list[bool] | None, expected: RowScore) -> None:
    assert score_row(QUERY, candidates, None if same is None else np.array(same)) == expected


def test_equal_vectors_tie_wherever_they_stand() -> None:
    # A collapsed model's equal candidates must all tie. Matrix products break such ties by one bit at many of these
    # shapes (at (7, 9) or (61, 3), depending on the processor), in favour of some candidates' places.
    rng = np.random.default_rng(0)
    for dimensions in (7, 61, 1536):
        query, candidate = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, dimensions)))
        for count in (*range(2, 70), 1000, 1003):
            candidates = np.tile(candidate.astype(np.float32), (count, 1))
            assert score_row(query.astype(np.float32), candidates) == RowScore(0, False), (dimensions, count)


def plain(query: list[int], candidates: list[list[int]], texts: list[str]) -> tuple[int, bool, bool]:
    """The definition in exact integers: (rank, official hit, strict hit)."""
    scores = [sum(a * b for a, b in zip(query, candidate, strict=True)) for candidate in candidates]
    official = scores.index(max(scores)) == 0
    others = [score for score, text in zip(scores, texts, strict=True) if text != texts[0]]
    return sum(score > scores[0] for score in scores), official, all(scores[0] > other for other in others)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=4, max_size=4),
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(-2, 2), min_size=4, max_size=4)),
        min_size=1,
        max_size=8,
    ),
)
def test_agrees_with_the_definition(query: list[int], labelled: list[tuple[str, list[int]]]) -> None:
    vectors: dict[str, list[int]] = {}
    for text, vector in labelled:  # equal texts have equal vectors
        vectors.setdefault(text, vector)
    texts = [text for text, _ in labelled]
    candidates = [vectors[text] for text in texts]
    rank, official, strict = plain(query, candidates, texts)
    score = score_row(
        np.array(query, dtype=np.float32),
        np.array(candidates, dtype=np.float32),
        np.array([text == texts[0] for text in texts]),
    )
    assert (score.rank, score.rank == 0, score.strict) == (rank, official, strict)


def test_shapes_must_fit() -> None:
    for candidates in (rows((1, 0, 0)), np.zeros((0, 2), np.float32), QUERY):
        with pytest.raises(ValueError, match="do not fit"):
            score_row(QUERY, candidates)


def dataset_score(name: str, task: str, in_domain: bool, ranks: list[int], ties: int = 0) -> DatasetScore:
    outcome = tuple(RowScore(rank, rank == 0 and number >= ties) for number, rank in enumerate(ranks))
    return DatasetScore(DatasetInfo(name, task, in_domain, "label"), outcome)


def test_averages_count_datasets_alike() -> None:
    scores = [
        dataset_score("a", "Classification", True, [0, 0, 0, 1]),  # 0.75
        dataset_score("b", "Classification", False, [0, 1], ties=1),  # 0.5, strictly 0
        dataset_score("c", "VQA", True, [1, 1, 1, 1, 1, 1, 1, 1]),  # 0
        dataset_score("d", "Grounding", True, []),  # nothing scored: left out
    ]
    averages = average(scores)
    assert averages.meta_tasks == {"Classification": 0.625, "VQA": 0.0, "Grounding": None}
    assert averages.ind == 0.375
    assert averages.ood == 0.5
    assert averages.overall == pytest.approx(1.25 / 3)
    assert average(scores, strict=True).ood == 0.0
    assert average(scores[:1]).ood is None
    assert average([]).overall is None


def test_warns_when_ties_decide(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not warn_about_ties(dataset_score("clean", "VQA", True, [0, 1]))
        assert caplog.records == []
        assert warn_about_ties(dataset_score("tied", "VQA", True, [0, 0, 1], ties=1))
    assert "tied: 1 of 3 rows are hits only because a tie counts" in caplog.text


def test_ranking_metrics_by_hand() -> None:
    figures = ranking_metrics(dataset_score("a", "VQA", True, [0, 3, 7, 20]))
    assert figures["hit@1"] == 0.25
    assert figures["hit@5"] == 0.5
    assert figures["hit@10"] == 0.75
    assert figures["recall@10"] == 0.75
    assert figures["precision@5"] == pytest.approx(0.5 / 5)
    assert figures["f1@5"] == pytest.approx((2 * (1 / 3)) / 4)  # 2 * 0.2 * 1 / 1.2 for two rows of four
    assert figures["mrr@10"] == pytest.approx((1 + 1 / 4 + 1 / 8) / 4)
    assert figures["map@5"] == pytest.approx((1 + 1 / 4) / 4)
    ndcg = (1 + 1 / math.log2(5) + 1 / math.log2(9)) / 4
    assert figures["ndcg_linear@10"] == figures["ndcg_exponential@10"] == pytest.approx(ndcg)
    assert (figures["num_pred"], figures["num_data"]) == (4, 4)
    assert len(figures) == 26  # the keys of VLM2Vec's own score files: 8 metrics at 3 cutoffs, and two counts
    assert ranking_metrics(dataset_score("a", "VQA", True, []))["hit@1"] == 0.0
