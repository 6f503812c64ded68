"""Search in jobs: the merged result is that of one exact search, to the bit, whoever did the jobs."""

from pathlib import Path

import numpy as np
import pytest

from gen2embed_mteb.bulk.processes import Share
from trainers.saha.block_jobs import BlockWorker, KnownPools, search_in_blocks
from trainers.saha.clusters import mine_clusters
from trainers.saha.hard_negatives import hard_negatives
from trainers.saha.search import ExactSearch


def unit(matrix: np.ndarray) -> np.ndarray:
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)


def coarse(rows: int, seed: int) -> np.ndarray:
    """Few distinct vectors: many equal scores, also across blocks."""
    grid = np.random.default_rng(seed).integers(-1, 2, (rows, 4)).astype(float)
    grid[:, 0] += 2.5
    return unit(grid)


def smooth(rows: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, 24)))


@pytest.mark.parametrize("draw", [coarse, smooth])
@pytest.mark.parametrize(("rows", "kept"), [(7, 5), (40, 30), (1000, 9), (10, 1000)])
def test_the_merged_result_is_that_of_one_search(tmp_path: Path, draw, rows: int, kept: int) -> None:
    queries, candidates = draw(53, 0), draw(91, 1)
    columns, scores = search_in_blocks(queries, candidates, kept, tmp_path, rows=rows)
    want = ExactSearch(candidates).top_k(queries, kept)
    assert np.array_equal(columns, want[0])
    assert np.array_equal(scores.view(np.int32), want[1].view(np.int32))


def test_jobs_are_done_once_and_damaged_ones_again(tmp_path: Path, monkeypatch, caplog) -> None:
    queries, candidates = smooth(30, 0), smooth(40, 1)
    first = search_in_blocks(queries, candidates, 5, tmp_path, rows=20)
    results = sorted(tmp_path.glob("*.block"))
    assert len(results) == 4
    bytes_before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    results[1].write_bytes(damaged := results[1].read_bytes()[:-3])
    results[2].unlink()
    done: list[str] = []
    run = BlockWorker.run
    monkeypatch.setattr(BlockWorker, "run", lambda self, job: done.append(job.key) or run(self, job))
    again = search_in_blocks(queries, candidates, 5, tmp_path, rows=20)
    assert [np.array_equal(one, other) for one, other in zip(first, again, strict=True)] == [True, True]
    assert sorted(key[:32] for key in done) == [results[1].stem, results[2].stem]
    (aside,) = tmp_path.glob("*.set-aside-*")  # it may be somebody's
    assert aside.read_bytes() == damaged
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path != aside} == bytes_before
    assert "damaged, or of other work" in caplog.text
    # A peer that is not there: its jobs are done here after a while.
    share = Share(1, 2, patience=0.1, poll_interval=0.01)
    done.clear()
    shared = search_in_blocks(queries, candidates, 6, tmp_path, rows=20, share=share)
    assert len(done) == 4
    assert np.array_equal(shared[0][:, :5], first[0])


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_known_pools_mine_what_a_search_mines(tmp_path: Path, variant) -> None:
    queries, candidates = coarse(60, 2), coarse(40, 3)
    positives = np.random.default_rng(6).integers(0, 40, 60)
    given = (queries, candidates, positives)
    known = KnownPools(queries, candidates, *search_in_blocks(queries, candidates, 13, tmp_path, rows=16))
    mined, want = (mine_clusters(*given, 3, 2, variant, search=search) for search in (known, None))
    for name in ("anchors", "members", "phase"):
        assert np.array_equal(getattr(mined, name), getattr(want, name))
    for beta in (None, 0.01):  # the margin asks deeper than what is known
        one, other = (hard_negatives(*given, 4, beta, search=search) for search in (known, None))
        assert np.array_equal(one.candidates, other.candidates)
    stranger = unit(smooth(3, 7)[:, :4])
    assert np.array_equal(known.top_k(stranger, 5)[0], ExactSearch(candidates).top_k(stranger, 5)[0])
