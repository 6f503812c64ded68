"""The numbers of a space, by hand and against slow loops; the projection without UMAP."""

import importlib.util

import numpy as np
import pytest
from sklearn.decomposition import PCA

from gen2embed_mteb.analysis.space import projection
from gen2embed_mteb.analysis.space.numbers import numbers_of, side_accuracy
from gen2embed_mteb.analysis.space.projection import check_projection, principal_components, projected
from gen2embed_mteb.errors import Gen2EmbedError


def unit(random: np.random.Generator, count: int, width: int = 8, shift: float = 0.0) -> np.ndarray:
    vectors = random.normal(size=(count, width)) + shift
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_two_pairs_by_hand() -> None:
    axes = np.eye(2, dtype=np.float32)
    found = numbers_of(axes, axes, np.array([[0, 0], [1, 1]]))
    assert (found.pair_cosine, found.other_cosine, found.cosine_gap) == (1, 0, 1)
    assert (found.centroid_distance, found.recall_at_1) == (0, 1)
    turned = numbers_of(axes, -axes, np.array([[0, 0], [1, 1]]))
    assert (turned.pair_cosine, turned.cosine_gap, turned.recall_at_1) == (-1, -1, 0)
    assert turned.centroid_distance == pytest.approx(2**0.5)


def test_a_tie_counts_as_a_miss_and_any_positive_as_a_hit() -> None:
    axes = np.eye(2, dtype=np.float32)
    same = np.array([[1, 0], [1, 0]], dtype=np.float32)
    assert numbers_of(axes[:1], same, np.array([[0, 0]])).recall_at_1 == 0
    assert numbers_of(axes[:1], axes, np.array([[0, 0], [0, 1]])).recall_at_1 == 1
    alone = numbers_of(axes[:1], axes[:1], np.array([[0, 0]]))
    assert (alone.other_cosine, alone.cosine_gap, alone.side_accuracy, alone.recall_at_1) == (None, None, None, 1)


def test_random_vectors_as_slow_loops_have_it() -> None:
    random = np.random.default_rng(3)
    queries, candidates = unit(random, 30), unit(random, 12)
    pairs = np.array([[number, int(random.integers(12))] for number in range(30)])
    found = numbers_of(queries, candidates, pairs)
    own = {tuple(pair) for pair in pairs.tolist()}
    inside, outside, hits = [], [], 0
    for query in range(30):
        scores = [float(np.dot(queries[query].astype(float), one.astype(float))) for one in candidates]
        for candidate, score in enumerate(scores):
            (inside if (query, candidate) in own else outside).append(score)
        hits += (query, int(np.argmax(scores))) in own
    assert found.pair_cosine == pytest.approx(np.mean(inside))
    assert found.other_cosine == pytest.approx(np.mean(outside))
    assert found.recall_at_1 == pytest.approx(hits / 30)


def test_the_classifier_finds_a_gap_and_none_where_there_is_none() -> None:
    random = np.random.default_rng(0)
    assert side_accuracy(unit(random, 60, shift=-9.0), unit(random, 60, shift=9.0)) == 1.0
    assert side_accuracy(unit(random, 400), unit(random, 400)) == pytest.approx(0.5, abs=0.07)
    # With a thousand queries and nine candidates, the larger side alone would be right in 99 of 100 cases.
    few = side_accuracy(unit(random, 300), unit(random, 9))
    assert few is not None and few < 0.75


def test_principal_components_are_those_of_sklearn() -> None:
    vectors = unit(np.random.default_rng(1), 40)
    ours, theirs = principal_components(vectors), PCA(2).fit_transform(vectors.astype(np.float64))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-9)
    np.testing.assert_array_equal(ours, projected(vectors, "pca"))
    assert principal_components(vectors[:1]).tolist() == [[0, 0]]


def test_without_umap_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Gen2EmbedError, match=r"gen2embed\[analysis\].*--projection pca"):
        check_projection("umap")
    check_projection("pca")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
def test_umap_gives_the_same_places_again_and_keeps_clouds_apart() -> None:
    random = np.random.default_rng(2)
    vectors = np.concatenate([unit(random, 40), unit(random, 40, shift=4.0)])
    places = projected(vectors, "umap")
    np.testing.assert_array_equal(places, projected(vectors, "umap"))
    centers = places[:40].mean(0), places[40:].mean(0)
    assert np.linalg.norm(centers[0] - centers[1]) > places[:40].std()
    assert projected(vectors[:5], "umap").shape == (5, 2)
