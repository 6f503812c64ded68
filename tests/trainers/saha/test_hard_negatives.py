"""Plain hard negatives, by hand and against a loop over all pairs."""

import numpy as np
import pytest

from trainers.saha import hard_negatives as negatives
from trainers.saha.hard_negatives import hard_negatives


def units(*angles):
    """Unit vectors in the plane at these angles in degrees."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def random_units(rng, count, width=8):
    vectors = rng.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_hn_is_the_global_top_k_without_the_positive():
    found = hard_negatives(units(0), units(0, 10, 20, 90), np.array([1]), num_hard_negatives=2)
    assert found.candidates.tolist() == [[0, 2]]
    np.testing.assert_allclose(found.similarities, [[1.0, np.cos(np.radians(20))]], atol=1e-6)


def test_hn_beta_drops_what_beats_the_positive_by_more_than_beta_and_goes_on_behind():
    # The positive is at cos 20 = 0.940; candidates at 0, 5 and 15 degrees: 1.000, 0.996, 0.966.
    candidates = units(20, 0, 5, 15, 30, 60)
    positives = np.array([0])
    assert hard_negatives(units(0), candidates, positives, 2).candidates.tolist() == [[1, 2]]
    assert hard_negatives(units(0), candidates, positives, 2, beta=0.02).candidates.tolist() == [[4, 5]]
    assert hard_negatives(units(0), candidates, positives, 2, beta=0.03).candidates.tolist() == [[3, 4]]
    assert hard_negatives(units(0), candidates, positives, 2, beta=1.0).candidates.tolist() == [[1, 2]]


def test_ties_take_the_smaller_index_and_what_is_missing_is_minus_one():
    found = hard_negatives(units(0, 0), units(0, 50, 50, 50), np.array([0, 2]), num_hard_negatives=5)
    assert found.candidates.tolist() == [[1, 2, 3, -1, -1], [0, 1, 3, -1, -1]]
    assert np.isnan(found.similarities[:, 3:]).all()
    # Everything but the positive is above the margin: nothing is left.
    none = hard_negatives(units(0), units(90, 0, 1), np.array([0]), 2, beta=0.02)
    assert none.candidates.tolist() == [[-1, -1]]


@pytest.mark.parametrize("beta", [None, 0.02, -0.3])
def test_a_loop_over_all_pairs_finds_the_same(beta, monkeypatch):
    """Low positives make the margin reach deep: several rounds, several blocks."""
    monkeypatch.setattr(negatives, "RESULTS_AT_ONCE", 256)
    rng = np.random.default_rng(3)
    queries, candidates = random_units(rng, 60), random_units(rng, 90)
    positives = rng.integers(0, 90, 60)
    found = hard_negatives(queries, candidates, positives, 4, beta)
    for query in range(60):
        scores = candidates.astype(np.float64) @ queries[query].astype(np.float64)
        allowed = [
            number
            for number in range(90)
            if number != positives[query] and (beta is None or scores[number] <= scores[positives[query]] + beta)
        ]
        expected = sorted(allowed, key=lambda number: -scores[number])[:4]
        assert found.candidates[query].tolist() == expected + [-1] * (4 - len(expected))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"positives\[1\] is 3; candidate_embeddings has rows 0 to 2 only"):
        hard_negatives(units(0, 1), units(0, 1, 2), np.array([0, 3]))
    with pytest.raises(ValueError, match="num_hard_negatives is 0"):
        hard_negatives(units(0), units(0), np.array([0]), 0)
    with pytest.raises(ValueError, match=r"positives has shape \(2,\)"):
        hard_negatives(units(0), units(0), np.array([0, 0]))
