"""Queries with several positives: Algorithm 1 and plain hard negatives against slow loops over all pairs."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest

import trainers.saha.clusters as clusters_module
from gen2embed_mteb.errors import Gen2EmbedError
from trainers import mine_clusters
from trainers.saha.hard_negatives import hard_negatives


def unit(matrix: np.ndarray) -> np.ndarray:
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)


def table(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """All scores as documented, in integers: products in units of 2^-50, summed, rounded to float32."""
    units = np.rint(left.astype(np.float64)[:, None] * right.astype(np.float64)[None] * 2.0**50).astype(np.int64)
    return (units.sum(axis=2) / 2.0**50).astype(np.float32)


def oracle(queries: Any, candidates: Any, sets: list[set[int]], k: int, m: int) -> list[tuple[int, list[int], int]]:
    """[(anchor, members, phase)], as `positives.py` says."""
    to_candidate, to_query = table(queries, candidates), table(queries, queries)
    found: list[tuple[int, list[int], int]] = []
    used: set[int] = set()
    for phase in (1, 2):
        taken: set[int] = set() if phase == 2 else used
        for q in range(len(queries)):
            if q in used:
                continue
            pool = [d for d in np.lexsort((range(len(candidates)), -to_candidate[q])).tolist() if d not in sets[q]]
            owners = []
            for d in pool[: m * k]:
                of_d = [p for p in range(len(queries)) if d in sets[p]]
                if of_d:
                    owners.append(min(of_d, key=lambda p: (-to_query[q][p], p)))
            free = sorted({p for p in owners if p not in taken}, key=lambda p: (to_query[q][p], p))
            members: list[int] = []
            for p in free:
                if len(members) < k and all(not sets[p] & sets[other] for other in (q, *members)):
                    members.append(p)
            if members:
                found.append((q, members, phase))
                used |= {q, *members}
                taken |= {q, *members}
    for q in range(len(queries)):
        if q in used:
            continue
        for anchor, members, _ in found:
            if len(members) < k and all(not sets[q] & sets[other] for other in (anchor, *members)):
                members.append(q)
                break
        else:
            found.append((q, [], 2))
    return found


def instance(seed: int) -> tuple[Any, Any, list[list[int]], int, int]:
    """Random pairs, half of the queries with two to four positives; coarse vectors, so that there are many ties."""
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(5, 40)), int(rng.integers(4, 50))
    if seed % 2:
        queries, candidates = unit(rng.normal(size=(n, 6))), unit(rng.normal(size=(m, 6)))
    else:
        grid = rng.integers(-1, 2, (n + m, 4)).astype(float)
        grid[:, 0] += 2.5
        queries, candidates = np.split(unit(grid), [n])
    lists = [rng.choice(m, size=min(m, int(rng.choice([1, 1, 2, 4]))), replace=False).tolist() for _ in range(n)]
    lists[0] = rng.choice(m, size=2, replace=False).tolist()
    return queries, candidates, lists, int(rng.integers(1, 5)), int(rng.integers(1, 5))


def first_and_more(lists: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
    return np.array([one[0] for one in lists]), [one[1:] for one in lists]


@pytest.mark.parametrize("popular", [8, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("seed", range(30))
def test_clusters_equal_the_oracle(seed: int, popular: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters_module, "_POPULAR", popular)
    queries, candidates, lists, k, m = instance(seed)
    positives, more = first_and_more(lists)
    mined = mine_clusters(queries, candidates, positives, k, m, more_positives=more)
    members = [[member for member in row if member >= 0] for row in mined.members.tolist()]
    sets = [set(one) for one in lists]
    assert list(zip(mined.anchors.tolist(), members, mined.phase.tolist(), strict=True)) == oracle(
        queries, candidates, sets, k, m
    )
    for anchor, of_anchor in zip(mined.anchors.tolist(), members, strict=True):
        for one, other in combinations([anchor, *of_anchor], 2):
            assert not sets[one] & sets[other]  # whichever positives are trained, none is a false negative
    assert set(mined.anchors.tolist()) | {member for row in members for member in row} == set(range(len(queries)))


def test_one_positive_each_gives_what_it_gave_without_the_argument() -> None:
    queries, candidates, lists, k, m = instance(1)
    positives, _ = first_and_more(lists)
    for variant in ("paper", "official"):
        plain = mine_clusters(queries, candidates, positives, k, m, variant)  # type: ignore[arg-type]
        again = mine_clusters(queries, candidates, positives, k, m, variant, more_positives=[[] for _ in lists])  # type: ignore[arg-type]
        for name in ("anchors", "members", "phase", "similarities"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(again, name))


@pytest.mark.parametrize("beta", [None, 0.05, -0.3])
@pytest.mark.parametrize("seed", range(8))
def test_hard_negatives_equal_a_loop_over_all_pairs(seed: int, beta: float | None) -> None:
    queries, candidates, lists, k, _ = instance(seed)
    negatives = [
        np.random.default_rng(seed + number).choice(len(candidates), 2).tolist() for number in range(len(lists))
    ]
    positives, more = first_and_more(lists)
    found = hard_negatives(queries, candidates, positives, k, beta, more_positives=more, known_negatives=negatives)
    scores = table(queries, candidates)
    for q, own in enumerate(lists):
        limit = np.inf if beta is None else min(scores[q][own]) + np.float32(beta)
        left = [
            d
            for d in np.lexsort((range(len(candidates)), -scores[q])).tolist()
            if d not in own and d not in negatives[q] and scores[q][d] <= limit
        ]
        expected = [*left[:k], *[-1] * (k - len(left[:k]))]
        assert found.candidates[q].tolist() == expected


def test_what_cannot_be_is_refused_by_index() -> None:
    queries, candidates, lists, k, m = instance(1)
    positives, more = first_and_more(lists)
    with pytest.raises(Gen2EmbedError, match="'official' knows one positive per query"):
        mine_clusters(queries, candidates, positives, k, m, "official", more_positives=more)
    with pytest.raises(Gen2EmbedError, match=f"more_positives has 1 lists; give one for each of the {len(lists)}"):
        mine_clusters(queries, candidates, positives, k, m, more_positives=[[1]])
    with pytest.raises(Gen2EmbedError, match=r"more_positives\[3\] is 999; candidate_embeddings has rows 0 to"):
        mine_clusters(queries, candidates, positives, k, m, more_positives=[*more[:3], [999], *more[4:]])
