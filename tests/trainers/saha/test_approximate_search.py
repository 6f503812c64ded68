"""Approximate search: what it finds is scored and ordered exactly, and its recall is measured, not claimed."""

import numpy as np
import pytest

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.saha.approximate_search import IvfSearch, IvfSettings
from trainers.saha.clusters import mine_clusters
from trainers.saha.hard_negatives import hard_negatives
from trainers.saha.scores import canonical_scores
from trainers.saha.search import ExactSearch

pytest.importorskip("faiss")
WIDTH = 16


def unit(rows: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(rows, WIDTH))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


CANDIDATES, QUERIES = unit(900, 0), unit(60, 1)


def test_the_flag_is_checked() -> None:
    assert IvfSettings.named("exact") is None
    assert IvfSettings.named("ivf:4096,64") == IvfSettings(4096, 64)
    for text in ("ivf", "ivf:0,1", "ivf:16", "hnsw:16,2", "ivf:16,-1"):
        with pytest.raises(Gen2EmbedError, match="pass exact, or ivf:NLIST,NPROBE"):
            IvfSettings.named(text)
    with pytest.raises(Gen2EmbedError, match="nprobe is at most nlist"):
        IvfSettings.named("ivf:16,17")
    with pytest.raises(Gen2EmbedError, match="900 candidates are too few for 24 lists; pass fewer than 24"):
        IvfSearch(CANDIDATES, IvfSettings(24, 1))


def test_with_all_lists_it_finds_what_the_exact_search_finds() -> None:
    search, exact = IvfSearch(CANDIDATES, IvfSettings(20, 20)), ExactSearch(CANDIDATES)
    for found, want in zip(search.top_k(QUERIES, 30), exact.top_k(QUERIES, 30), strict=True):
        assert np.array_equal(found, want)
    left_out = exact.top_k(QUERIES, 1)[0][:, 0]
    found, _ = search.pools(QUERIES, 30, left_out)
    want, _ = exact.pools(QUERIES, 30, left_out)
    assert [sorted(row) for row in found] == [sorted(row) for row in want]
    assert search.recall(QUERIES, 30) == (1.0, 30, 60)
    positives = np.arange(60) * 3
    given = (QUERIES, CANDIDATES, positives)
    mined, want = mine_clusters(*given, 3, search=search), mine_clusters(*given, 3)
    assert np.array_equal(mined.members, want.members)
    negatives = hard_negatives(*given, 3, search=search), hard_negatives(*given, 3)
    assert np.array_equal(negatives[0].candidates, negatives[1].candidates)


def test_with_one_list_its_recall_is_what_counting_says() -> None:
    search = IvfSearch(CANDIDATES, IvfSettings(20, 1))
    columns, scores = search.top_k(QUERIES, 10)
    assert np.array_equal(scores[7], canonical_scores(np.repeat(QUERIES[7:8], 10, 0), CANDIDATES[columns[7]]))
    assert (np.diff(scores, axis=1) <= 0).all()
    true = np.argsort(-(QUERIES.astype(float) @ CANDIDATES.T.astype(float)), axis=1)[:, :10]
    shared = sum(len(set(one) & set(other)) for one, other in zip(columns.tolist(), true.tolist(), strict=True))
    assert search.recall(QUERIES, 10).share == shared / 600
    assert 0.1 < shared / 600 < 0.9
    again = IvfSearch(CANDIDATES, IvfSettings(20, 1))
    assert np.array_equal(again.top_k(QUERIES, 10)[0], columns)


def test_a_query_whose_list_is_too_short_is_searched_exactly() -> None:
    search = IvfSearch(CANDIDATES, IvfSettings(20, 1))
    assert np.array_equal(search.top_k(QUERIES, 500)[0], ExactSearch(CANDIDATES).top_k(QUERIES, 500)[0])
    assert search.top_k(QUERIES[:2], 5000)[0].shape == (2, 900)
