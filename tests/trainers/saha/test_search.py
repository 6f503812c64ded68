"""Exact search: the same answer whatever does the arithmetic, down to the last bit of a score."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import trainers.saha.search as search_module
from trainers.saha.scores import canonical_scores, error_bound, full_precision, sliced_product, sliced_terms
from trainers.saha.search import ExactSearch

WAYS: list[dict[str, Any]] = [
    {"backend": "torch"},
    {"backend": "torch", "tile": 7},
    {"backend": "torch", "tile": 11, "devices": ["cpu", "cpu", "cpu"]},
    {"backend": "faiss"},
    {"backend": "faiss", "tile": 50, "devices": ["cpu", "cpu"]},
]


def unit(matrix: np.ndarray) -> np.ndarray:
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)


def coarse(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    grid = rng.integers(-1, 2, (rows, width)).astype(float)
    grid[:, 0] += 2.5
    return unit(grid)


def documented(query: np.ndarray, candidates: np.ndarray) -> list[np.float32]:
    """Canonical scores in exact arithmetic."""
    scores = []
    for row in candidates:
        products = [Fraction(a) * Fraction(b) for a, b in zip(query.tolist(), row.tolist(), strict=True)]
        scores.append(np.float32(sum(round(product * 2**50) for product in products) / 2**50))
    return scores


def searcher(candidates: Any, way: dict[str, Any]) -> ExactSearch:
    if way["backend"] == "faiss":
        pytest.importorskip("faiss")
    return ExactSearch(candidates, **way)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_top_k_equals_sorting_exact_scores(way: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        many, width, k = int(rng.integers(1, 250)), int(rng.integers(1, 7)), int(rng.integers(1, 60))
        candidates, queries = coarse(rng, many, width), coarse(rng, 5, width)
        exact = [documented(query, candidates) for query in queries]
        want = [sorted(range(many), key=lambda d, row=row: (-row[d], d))[:k] for row in exact]
        search = searcher(candidates, way)
        found, scores = search.top_k(queries, k)
        assert found.tolist() == want
        assert scores.tolist() == [[row[d] for d in best] for row, best in zip(exact, want, strict=True)]
        left_out = rng.integers(0, many, 5)
        pools, near = search.pools(queries, k, left_out)
        for row, (pool, out) in enumerate(zip(pools, left_out.tolist(), strict=True)):
            order = sorted(range(many), key=lambda d, row=exact[row]: (-row[d], d))
            assert set(pool.tolist()) == set([d for d in order if d != out][:k])
            np.testing.assert_allclose(near[row], [exact[row][d] for d in pool], atol=search.error)
            assert (np.diff(near[row]) <= 0).all()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_scores_that_differ_in_the_last_bits_of_wide_vectors(way: dict[str, Any]) -> None:
    """Candidates a few ulp apart: a float32 product orders them by accident."""
    rng = np.random.default_rng(1)
    base = unit(rng.standard_normal((1, 1536)))
    candidates = np.repeat(base, 300, axis=0)
    candidates[np.arange(300), rng.integers(0, 1536, 300)] *= 1 + rng.integers(-6, 7, 300).astype(np.float32) * 1e-4
    queries = unit(base + 0.2 * unit(rng.standard_normal((3, 1536))))
    found, _ = searcher(candidates, way).top_k(queries, 40)
    for row, query in zip(found, queries, strict=True):
        exact = [np.float32(math.fsum((query.astype(np.float64) * c.astype(np.float64)).tolist())) for c in candidates]
        assert row.tolist() == sorted(range(300), key=lambda d, exact=exact: (-exact[d], d))[:40]


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]], ids=str)
def test_thousands_of_equal_vectors(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # All are within the error of the k-th best, so a block of queries keeps more than fits, and is halved.
    monkeypatch.setattr(search_module, "MAX_FOUND", 10_000)
    rng = np.random.default_rng(2)
    candidates = np.repeat(unit(rng.standard_normal((1, 24))), 6000, axis=0)
    candidates[[17, 4000]] = unit(candidates[:1] + 0.01)
    queries = unit(candidates[:6] + 0.02)
    search = searcher(candidates, way)
    found, _ = search.top_k(queries, 5)
    assert found.tolist() == [[17, 4000, 0, 1, 2]] * 6
    pools, _ = search.pools(queries, 5)
    assert [sorted(pool.tolist()) for pool in pools] == [[0, 1, 2, 17, 4000]] * 6


def test_canonical_scores_are_the_same_in_any_company_and_order() -> None:
    rng = np.random.default_rng(3)
    left, right = unit(rng.standard_normal((50, 700))), unit(rng.standard_normal((50, 700)))
    scores = canonical_scores(left, right)
    assert scores.dtype == np.float32
    assert scores.tolist() == [documented(a, b[None])[0] for a, b in zip(left, right, strict=True)]
    shuffle = rng.permutation(700)
    assert np.array_equal(canonical_scores(left[:, shuffle], right[:, shuffle]), scores)
    assert canonical_scores(left[7], right[7:9])[0] == scores[7]


@pytest.mark.parametrize("width", [3, 384, 385, 1536])
def test_the_error_bound_holds(width: int) -> None:
    rng = np.random.default_rng(4)
    # Equal terms round the same way every time: as bad as sums get.
    vectors = torch.from_numpy(np.concatenate((unit(rng.standard_normal((99, width))), unit(np.ones((1, width))))))
    exact = vectors.double() @ vectors.double().T
    assert (sliced_product(vectors, vectors) - exact).abs().max() < error_bound(sliced_terms(width))
    assert (vectors @ vectors.T - exact).abs().max() < error_bound(width)
    assert error_bound(sliced_terms(width)) <= error_bound(width) * 1.3


def test_half_precision_equals_its_float32_values() -> None:
    rng = np.random.default_rng(5)
    candidates, queries = coarse(rng, 90, 32), coarse(rng, 9, 32)
    for halve in (lambda x: x.astype(np.float16), lambda x: torch.from_numpy(x).bfloat16()):
        halves = halve(candidates), halve(queries)
        wide = [torch.as_tensor(half).float().numpy() for half in halves]
        exact = [documented(query, wide[0]) for query in wide[1]]
        want = [sorted(range(90), key=lambda d, row=row: (-row[d], d))[:8] for row in exact]
        for way in WAYS[:2]:
            assert ExactSearch(halves[0], **way).top_k(halves[1], 8)[0].tolist() == want


def test_the_callers_precision_is_neither_used_nor_lost() -> None:
    rng = np.random.default_rng(6)
    candidates, queries = unit(rng.standard_normal((500, 64))), unit(rng.standard_normal((20, 64)))
    want, _ = ExactSearch(candidates, backend="torch").top_k(queries, 9)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = ExactSearch(candidates, backend="torch").top_k(queries, 9)
            with full_precision():
                assert (torch.from_numpy(queries) @ torch.from_numpy(candidates).T).dtype == torch.float32
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    assert np.array_equal(found, want)


def test_what_cannot_be_searched_is_refused() -> None:
    good = coarse(np.random.default_rng(7), 4, 3)
    with pytest.raises(ValueError, match="k is 0"):
        ExactSearch(good).top_k(good, 0)
    with pytest.raises(ValueError, match="queries are 2 wide and candidates 3"):
        ExactSearch(good).top_k(unit(good[:, :2]), 1)
    with pytest.raises(ValueError, match=r"candidate_embeddings\[3\] holds NaN or an infinity"):
        ExactSearch(np.concatenate((good[:3], np.full((1, 3), np.inf, np.float32))))
