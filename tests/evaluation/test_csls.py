"""CSLS: by hand, against a plain recomputation, and the same bits wherever a candidate stands."""

import numpy as np
import pytest

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.csls import csls, hubness, inner_products


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_by_hand() -> None:
    queries = np.float32([[1, 0], [0, 1], [0.6, 0.8]])
    candidates = np.float32([[1, 0], [0, -1], [0.8, 0.6]])
    # Cosines with the three queries: (1, 0, 0.6), (0, -1, -0.8), (0.8, 0.6, 0.96).
    np.testing.assert_allclose(hubness(candidates, queries, 1), [1, 0, 0.96], atol=1e-7)
    np.testing.assert_allclose(hubness(candidates, queries, 2), [0.8, -0.4, 0.88], atol=1e-7)
    whole = [1.6 / 3, -0.6, 2.36 / 3]
    np.testing.assert_allclose(hubness(candidates, queries, 3), whole, atol=1e-7)
    np.testing.assert_allclose(hubness(candidates, queries), whole, atol=1e-7)  # ten, of which there are three
    # The third query: the hub loses to the first candidate's neighbour, though its cosine is higher.
    scores = csls(inner_products(candidates, queries[2]), hubness(candidates, queries, 2))
    np.testing.assert_allclose(scores, [1.2 - 0.8, -1.6 + 0.4, 1.92 - 0.88], atol=1e-6)


def test_a_hub_loses_to_what_is_near_to_one_query_only() -> None:
    queries = np.float32([[1, 0, 0], [0.6, 0.8, 0], [0.6, 0, 0.8]])
    hub, own = unit(np.array([[1, 0.4, 0.4]])), unit(np.array([[0.3, 0.95, 0]]))
    candidates = np.concatenate([hub, own])
    cosines = inner_products(candidates, np.float32([0.7, 0.7, 0.1414]))
    assert cosines[0] > cosines[1]
    scores = csls(cosines, hubness(candidates, queries, 2))
    assert scores[1] > scores[0]


@pytest.mark.parametrize("width", [3, 61, 192])
def test_equals_a_plain_recomputation_to_the_bit(width: int) -> None:
    random = np.random.default_rng(width)
    # Vectors of a generative model: nearly one direction, so that many queries are almost as near as the tenth.
    queries, candidates = (unit(5 + random.normal(size=(number, width))) for number in (300, 60))
    found = hubness(candidates, queries, 10)
    for number, candidate in enumerate(candidates):
        nearest = sorted((float(inner_products(queries[i : i + 1], candidate)[0]) for i in range(300)), reverse=True)
        assert found[number] == np.mean(np.array(sorted(nearest[:10])))


def test_equal_candidates_get_equal_numbers_wherever_they_stand() -> None:
    random = np.random.default_rng(0)
    queries = unit(3 + random.normal(size=(257, 61)))
    candidate = unit(3 + random.normal(size=(1, 61)))
    for count in (1, 2, 7, 63, 64, 65, 1000):
        assert len(set(hubness(np.repeat(candidate, count, axis=0), queries).tolist())) == 1
    alone = hubness(candidate, queries)[0]
    among = hubness(np.concatenate([unit(random.normal(size=(100, 61))), candidate]), queries)
    assert among[-1] == alone
    # Nor does the order of the queries matter.
    assert hubness(candidate, queries[::-1])[0] == alone


def test_more_products_than_fit_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    queries, candidates = (unit(random.normal(size=(number, 8))) for number in (50, 90))
    whole = hubness(candidates, queries)
    monkeypatch.setattr("gen2embed_mteb.evaluation.csls._MOST_SCORES", 120)
    assert (hubness(candidates, queries) == whole).all()


def test_what_does_not_fit_is_refused() -> None:
    vectors = np.float32([[1, 0]])
    for candidates, queries in ((vectors, vectors[:0]), (vectors, np.float32([[1, 0, 0]])), (vectors[0], vectors)):
        with pytest.raises(Gen2EmbedError, match="do not fit"):
            hubness(candidates, queries)
    with pytest.raises(Gen2EmbedError, match="neighbors is 0"):
        hubness(vectors, vectors, 0)
    assert hubness(np.zeros((0, 2), np.float32), vectors).shape == (0,)
