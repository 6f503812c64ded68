"""Algorithm 1 against an oracle: method section 2 once more, in plain loops, from a full table of scores."""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from samples import sample_of

import trainers.saha.clusters as clusters_module
import trainers.saha.owner_scores as crowd_module
from trainers import Clusters, mine_clusters

VARIANTS = [("paper", False), ("official", False), ("official", True)]


def unit(matrix: np.ndarray) -> np.ndarray:
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)


def coarse(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Unit vectors on a coarse grid: many equal scores, and many equal vectors."""
    grid = rng.integers(-1, 2, (rows, width)).astype(float)
    grid[:, 0] += 2.5
    return unit(grid)


def table(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """All scores as documented, in integers: products in units of 2^-50, summed, rounded to float32."""
    rows = []
    for vector in left.astype(np.float64):
        units = np.rint(vector * right.astype(np.float64) * 2.0**50).astype(np.int64).sum(1)
        rows.append((units / 2.0**50).astype(np.float32))
    return np.stack(rows)


def oracle(  # noqa: PLR0917 - the arguments of the function it stands for
    queries: Any, candidates: Any, positives: Any, k: int, m: int, variant: str, labelled: bool
) -> Any:
    """Forms clusters as the method says: [(anchor, members, phase)]."""

    @cache
    def to_candidate(q: int) -> list[float]:
        return table(queries[[q]], candidates)[0].tolist()

    @cache
    def to_query(q: int) -> list[float]:
        return table(queries[[q]], queries)[0].tolist()

    def nearest(q: int) -> list[int]:
        return sorted(range(len(candidates)), key=lambda d: (-to_candidate(q)[d], d))

    def owner(q: int, among: Sequence[int]) -> int:
        return min(among, key=lambda p: (-to_query(q)[p], p))

    owners: dict[int, list[int]] = {}
    for query, positive in enumerate(positives.tolist()):
        owners.setdefault(positive, []).append(query)
    formed: list[tuple[int, list[int], int]] = []
    used: set[int] = set()

    for phase in (1, 2):
        taken: set[int] = set()
        for q in [q for q in range(len(queries)) if q not in used]:
            if q in taken:
                continue
            if variant == "paper":
                pool = [d for d in nearest(q) if d != positives[q]][: m * k]
                found = [owner(q, owners[d]) for d in pool if d in owners]
                found = [p for p in found if p not in taken]
            else:
                fetched = [d for d in nearest(q)[: 2 * m * k] if d != positives[q]]
                found = []
                for d in fetched:
                    free = [p for p in owners.get(d, []) if p not in taken]
                    if free and len(found) < m * k * phase:
                        found.append(owner(q, free))
            if not labelled:
                found.sort(key=lambda p: (to_query(q)[p], p))
            members = found[:k]
            if members:
                formed.append((q, members, phase))
                taken |= {q, *members}
                used |= {q, *members}
    if variant == "paper":
        for q in [q for q in range(len(queries)) if q not in used]:
            for anchor, members, _ in formed:
                if len(members) < k and positives[q] not in [positives[p] for p in (anchor, *members)]:
                    members.append(q)
                    break
            else:
                formed.append((q, [], 2))
    return formed


def plain(clusters: Clusters) -> Any:
    return [
        (int(anchor), [int(p) for p in members if p >= 0], int(phase))
        for anchor, members, phase in zip(clusters.anchors, clusters.members, clusters.phase, strict=True)
    ]


def assert_properties(clusters: Clusters, positives: np.ndarray, variant: str) -> None:
    seen_in_phase_1: set[int] = set()
    everyone: set[int] = set()
    for anchor, members, phase in plain(clusters):
        inside = [anchor, *members]
        assert len(set(inside)) == len(inside)
        assert len(set(positives[inside].tolist())) == len(inside)
        if phase == 1:
            assert seen_in_phase_1.isdisjoint(inside)
            seen_in_phase_1.update(inside)
        everyone.update(inside)
    if variant == "paper":
        assert everyone == set(range(len(positives)))
    assert clusters.anchors.dtype == clusters.members.dtype == np.int64
    assert clusters.similarities.shape == clusters.members.shape
    assert np.array_equal(np.isnan(clusters.similarities), clusters.members < 0)
    short = clusters.members < 0
    assert (short[:, 1:] >= short[:, :-1]).all(), "-1 stands at the end"


def instance(seed: int) -> tuple[Any, ...]:
    """A random small problem: one-to-one, labels, anything between, owned by nobody, k beyond what exists."""
    rng = np.random.default_rng(seed)
    many, width = int(rng.integers(1, 90)), int(rng.integers(2, 7))
    kind = rng.choice(["one-to-one", "shared", "labels"])
    few = many if kind == "one-to-one" else int(rng.integers(1, 7 if kind == "labels" else many + 20))
    queries, candidates = coarse(rng, many, width), coarse(rng, few, width)
    positives = rng.permutation(many) if kind == "one-to-one" else rng.integers(0, few, many)
    return queries, candidates, positives, int(rng.integers(1, 9)), int(rng.integers(1, 5))


@pytest.mark.parametrize(("variant", "labelled"), VARIANTS)
@pytest.mark.parametrize("popular", [0, 8])
@pytest.mark.slow
def test_equals_the_oracle(variant: Any, labelled: bool, popular: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small problems have no "popular" candidates by the default threshold.
    monkeypatch.setattr(clusters_module, "_POPULAR", popular)
    for seed in range(100):
        queries, candidates, positives, k, m = instance(seed)
        found = mine_clusters(queries, candidates, positives, k, m, variant, labelled, backend="torch")
        assert plain(found) == oracle(queries, candidates, positives, k, m, variant, labelled), seed
        assert_properties(found, positives, variant)


@pytest.mark.parametrize(("variant", "labelled"), VARIANTS)
def test_equals_the_oracle_on_many_queries_of_few_labels(variant: Any, labelled: bool) -> None:
    rng = np.random.default_rng(7)
    labels = coarse(rng, 60, 8)
    positives = rng.integers(0, 60, 3000)
    queries = unit(labels[positives] + 0.5 * coarse(rng, 3000, 8))
    found = mine_clusters(queries, labels, positives, 3, 4, variant, labelled)
    assert plain(found) == oracle(queries, labels, positives, 3, 4, variant, labelled)
    assert_properties(found, positives, variant)


@pytest.mark.parametrize(("variant", "labelled"), VARIANTS)
@pytest.mark.parametrize("case", ["alone", "one candidate", "one positive of several", "k beyond what exists"])
def test_equals_the_oracle_at_the_edges(case: str, variant: Any, labelled: bool) -> None:
    rng = np.random.default_rng(3)
    many, few, k = {"alone": (1, 1, 7), "one candidate": (9, 1, 3), "one positive of several": (9, 5, 3)}.get(
        case, (5, 5, 50)
    )
    queries, candidates = coarse(rng, many, 4), coarse(rng, few, 4)
    positives = np.arange(many) if many == few else np.full(many, few - 1)
    found = mine_clusters(queries, candidates, positives, k, 2, variant, labelled)
    assert found.members.shape == (len(found.anchors), k)
    assert plain(found) == oracle(queries, candidates, positives, k, 2, variant, labelled)
    if case != "k beyond what exists":
        # Nobody can be anybody's negative: each stays alone, or is lost.
        assert plain(found) == ([(q, [], 2) for q in range(many)] if variant == "paper" else [])


def test_members_by_hand() -> None:
    # On a circle: query 0 finds candidates 1, 2, 3, 4 in this order; their owners are 50, 20, 90, 150 degrees off.
    def circle(*degrees: float) -> np.ndarray:
        radians = np.radians(degrees)
        return unit(np.stack([np.cos(radians), np.sin(radians)], 1))

    queries, candidates = circle(0, 50, 20, 90, 150), circle(5, 10, 15, 30, 120)
    found = mine_clusters(queries, candidates, np.arange(5), num_hard_negatives=2, pool_multiplier=2)
    assert plain(found)[0] == (0, [4, 3], 1)
    narrow = mine_clusters(queries, candidates, np.arange(5), num_hard_negatives=2, pool_multiplier=1)
    assert plain(narrow)[0] == (0, [1, 2], 1)
    np.testing.assert_allclose(narrow.similarities[0], np.cos(np.radians([50, 20])), atol=1e-6)
    labelled = mine_clusters(queries, candidates, np.arange(5), 2, 2, "official", labelled=True)
    assert plain(labelled)[0] == (0, [1, 2], 1)


def test_fillers_take_the_first_place_they_fit_in() -> None:
    # One candidate is everybody's positive but one query's: that one pairs with query 0 and leaves the rest over.
    vectors = unit(np.eye(5) + 1)
    found = mine_clusters(vectors, vectors[:2], np.array([0, 0, 0, 1, 0]), num_hard_negatives=2)
    assert plain(found) == [(0, [3], 1), (1, [3], 2), (2, [], 2), (4, [], 2)]
    # Were query 4's positive a third candidate, the first cluster would have room for it.
    third = mine_clusters(vectors, vectors[:3], np.array([0, 0, 0, 1, 2]), num_hard_negatives=1)
    everyone = {query for anchor, members, _ in plain(third) for query in (anchor, *members)}
    assert everyone == set(range(5))


@pytest.mark.parametrize(("variant", "labelled"), VARIANTS)
@pytest.mark.parametrize("kind", sample_of(["one-to-one", "labels", "mixed"], ["mixed"]))
@pytest.mark.slow
def test_nothing_but_the_vectors_matters(
    kind: str, variant: Any, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide vectors: products that differ in their last bits with every tile, backend and number of threads."""
    rng = np.random.default_rng(11)
    few = {"one-to-one": 600, "labels": 20, "mixed": 200}[kind]
    candidates = unit(rng.standard_normal((few, 500)))
    candidates[few // 2 : few // 2 + 5] = candidates[3]
    positives = np.arange(600) if few == 600 else np.minimum(rng.zipf(1.6, 600) - 1, few - 1)
    queries = unit(candidates[positives] + 0.1 * rng.standard_normal((600, 500)))
    queries[100:110] = queries[5]
    want = mine_clusters(queries, candidates, positives, 4, 3, variant, labelled, backend="torch")
    assert_properties(want, positives, variant)
    wants = [want.anchors, want.members, want.phase, want.similarities]

    def same(*inputs: Any, **options: Any) -> bool:
        found = mine_clusters(*inputs, 4, 3, variant, labelled, **options)
        pairs = zip(wants, [found.anchors, found.members, found.phase, found.similarities], strict=True)
        return all(np.array_equal(left, right, equal_nan=left.dtype.kind == "f") for left, right in pairs)

    given = (queries, candidates, positives)
    assert same(*given, backend="torch", tile=37)
    assert same(*given, backend="torch", devices=["cpu", "cpu", "cpu"])
    assert same(torch.from_numpy(queries), torch.from_numpy(candidates), torch.from_numpy(positives))
    assert same(queries.astype(np.float64), candidates[::-1][::-1], positives.tolist(), backend="torch")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert same(*given, backend="torch")
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(crowd_module, "_LARGEST_BLOCK", 7)
    monkeypatch.setattr(crowd_module, "MAX_COPY", 0)
    monkeypatch.setattr(crowd_module, "TILE", 50)
    assert same(*given, backend="torch")
    pytest.importorskip("faiss")
    assert same(*given, backend="faiss")
    assert same(*given, backend="faiss", tile=100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_at_its_word(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    queries, candidates = (torch.from_numpy(coarse(rng, 80, 64)).to(dtype) for _ in range(2))
    found = mine_clusters(queries, candidates, np.arange(80), 3, 2)
    positives = np.arange(80)
    assert plain(found) == oracle(queries.float().numpy(), candidates.float().numpy(), positives, 3, 2, "paper", False)


def test_wrong_input_is_refused_by_index() -> None:
    good = coarse(np.random.default_rng(0), 6, 3)
    positives = np.arange(6)

    def broken(row: int, value: Any) -> np.ndarray:
        vectors = good.copy()
        vectors[row] = value
        return vectors

    def refused(message: str, *inputs: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            mine_clusters(*inputs, **options)

    refused(r"query_embeddings\[4\] holds NaN", broken(4, np.nan), good, positives)
    refused(r"candidate_embeddings\[2\] is all zeros", good, broken(2, 0), positives)
    refused(r"candidate_embeddings\[1\] has length 2, not 1; divide", good, broken(1, [2, 0, 0]), positives)
    refused(r"query_embeddings has shape \(3,\)", good[0], good, positives)
    refused(r"query_embeddings has shape \(0, 3\)", good[:0], good, positives[:0])
    refused(r"query_embeddings are 2 wide and candidate_embeddings 3", unit(good[:, :2]), good, positives)
    refused(r"query_embeddings holds torch.int64", np.eye(3, dtype=int), good, positives[:3])
    refused(r"positives has shape \(5,\)", good, good, positives[:5])
    refused(r"positives\[5\] is 6; candidate_embeddings has rows 0 to 5", good, good, [0, 1, 2, 3, 4, 6])
    refused(r"positives\[0\] is -1", good, good, positives - 1)
    refused("positives holds float64", good, good, positives + 0.5)
    refused("num_hard_negatives is 0", good, good, positives, num_hard_negatives=0)
    refused("pool_multiplier is 0", good, good, positives, pool_multiplier=0)
    refused("variant is 'papre'", good, good, positives, variant="papre")
    refused("backend is 'numpy'", good, good, positives, backend="numpy")
    refused("tile is 0", good, good, positives, tile=0)


def test_the_package_loads_without_torch() -> None:
    code = (
        "import sys, trainers; assert 'torch' not in sys.modules; assert trainers.mine_clusters and trainers.Clusters"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
