"""The best candidates of a row, reordered by a second score: against a slow sort of all candidates."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from gen2embed_mteb.mmeb.reranking.top_candidates import TopCandidates


def slow(scores: list[int], numbers: list[int], second: dict[int, int], k: int, *, kind: bool) -> int:
    """The rank of candidate 0 in the whole reordered list; `kind` puts it before candidates that are equal to it."""
    distinct = [place for place, number in enumerate(numbers) if numbers.index(number) == place]

    def tie(place: int) -> float:
        return -1 if place == 0 and kind else (np.inf if place == 0 else place)

    order = sorted(distinct, key=lambda place: (-scores[place], tie(place)))
    best, rest = order[:k], order[k:]
    best.sort(key=lambda place: (-second[numbers[place]], -scores[place], tie(place)))
    return (best + rest).index(0)


def test_ranks_are_those_of_a_slow_sort() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        n, k = draw.randint(1, 6), draw.randint(1, 7)
        numbers = [draw.randint(0, 5) for _ in range(n)]
        score = {number: draw.randint(0, 3) for number in numbers}
        second = {number: draw.randint(0, 2) for number in numbers}
        scores = [score[number] for number in numbers]  # equal candidates have equal scores
        top = TopCandidates.of(np.array(scores, np.float32), np.array(numbers), k)
        rank, strict = top.reordered(np.array([second[numbers[place]] for place in top.places], np.float64))
        assert (rank == 0) == (slow(scores, numbers, second, k, kind=True) == 0)
        if 0 in top.places:
            assert rank == slow(scores, numbers, second, k, kind=True)
        assert strict == (slow(scores, numbers, second, k, kind=False) == 0)


@pytest.mark.parametrize(
    ("second", "outcome"),
    [([3.0, 2.0], (0, True)), ([2.0, 3.0], (1, False)), ([2.0, 2.0], (0, True))],
)
def test_ties_follow_the_embedding(second: list[float], outcome: tuple[int, bool]) -> None:
    top = TopCandidates.of(np.array([0.9, 0.8, 0.1], np.float32), None, 2)
    assert top.places.tolist() == [0, 1]
    assert top.reordered(np.array(second)) == outcome


def test_what_stays_behind_keeps_its_place() -> None:
    top = TopCandidates.of(np.array([0.1, 0.8, 0.9, 0.7], np.float32), None, 2)
    assert top.places.tolist() == [2, 1]
    for second in itertools.permutations([1.0, 2.0]):
        assert top.reordered(np.array(second)) == (3, False)


def test_a_candidate_that_repeats_the_positive_is_none_of_its_rivals() -> None:
    top = TopCandidates.of(np.array([0.9, 0.9, 0.8], np.float32), np.array([4, 4, 5]), 2)
    assert top.places.tolist() == [0, 2]
    assert top.reordered(np.array([1.0, 0.0])) == (0, True)
