"""Exact search over the parts of an index: against a slow oracle, in every form, with ties and CSLS."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_jobs import encode, texts, write_lines
from plain_encoder import PlainEncoder

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.search_command.index import Index

NEIGHBORS = 3


class Directions(PlainEncoder):
    """A direction of its own for every text."""

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        rows = [np.random.default_rng(sum(entry["text"].encode())).standard_normal(32) for entry in inputs]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


@pytest.fixture
def query() -> np.ndarray:
    made = np.random.default_rng(5).standard_normal(32)
    return (made / np.linalg.norm(made)).astype(np.float32)


@pytest.fixture(params=["float32", "float16", "int8", "npy"])
def folder(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """30 rows in parts of 12; the same in any form."""
    monkeypatch.setattr("gen2embed_mteb.encode_command.part_files.ROWS_AT_ONCE", 5)
    data = write_lines(tmp_path / "t.jsonl", [*texts(29), "{broken"])
    kind = {"file_format": "npy", "precision": "int8"} if request.param == "npy" else {"precision": request.param}
    encode(data, tmp_path / "o", Directions(), rows_per_shard=12, **kind)
    return tmp_path / "o"


def vectors_of(rows: list[dict[str, Any]]) -> np.ndarray:
    return Directions()._encode("document", rows).astype(np.float64)


def test_the_nearest_rows_are_those_of_the_whole_product(folder: Path, query: np.ndarray) -> None:
    rows = texts(29)
    scores = vectors_of(rows) @ query
    want = sorted(range(29), key=lambda row: (-round(scores[row], 3), row))
    hits = Index(folder).search(query, 7)
    assert len({hit.row for hit in hits}) == 7
    for hit, row in zip(hits, want, strict=False):
        assert abs(hit.score - scores[row]) < 5e-3
        assert abs(hit.score - scores[hit.row]) < 5e-3
        assert (hit.id, hit.text) == (rows[hit.row]["id"], rows[hit.row]["text"])
    assert len(Index(folder).search(query, 100)) == 29


def test_csls_subtracts_the_mean_of_the_nearest_others(folder: Path, query: np.ndarray) -> None:
    unit = vectors_of(texts(29))
    sample = np.unique(np.linspace(0, 28, 10).astype(int))
    want = []
    for row in range(29):
        others = [unit[row] @ unit[other] for other in sample if other != row]
        want.append(2 * unit[row] @ query - np.mean(sorted(others)[-NEIGHBORS:]))
    hits = Index(folder).search(query, 29, csls_neighbors=NEIGHBORS, csls_sample=10)
    assert {hit.row for hit in hits} == set(range(29))
    assert max(abs(hit.score - want[hit.row]) for hit in hits) < 1e-2
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_equal_vectors_are_in_the_order_of_their_rows(tmp_path: Path, query: np.ndarray) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": "same"}, {"text": "other"}] * 20)
    encode(data, tmp_path / "o", Directions(), rows_per_shard=7)
    rows = [hit.row for hit in Index(tmp_path / "o").search(query, 40)]
    assert rows in ([*range(0, 40, 2), *range(1, 40, 2)], [*range(1, 40, 2), *range(0, 40, 2)])


def test_a_truncated_index_compares_the_first_numbers(tmp_path: Path, query: np.ndarray) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(20))
    encode(data, tmp_path / "o", Directions(), truncate_dim=8)
    unit, short = vectors_of(texts(20))[:, :8], query[:8] / np.linalg.norm(query[:8])
    scores = (unit / np.linalg.norm(unit, axis=1, keepdims=True)) @ short
    best = Index(tmp_path / "o").search(query, 1)[0]
    assert abs(best.score - scores.max()) < 1e-6
    with pytest.raises(Gen2EmbedError, match="the query has 4 numbers, the index 8"):
        Index(tmp_path / "o").search(query[:4], 1)


def test_an_index_that_lacks_something_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Gen2EmbedError, match=r"no manifest\.json in it"):
        Index(tmp_path)
    name = next(folder.glob("part-000001.[pn]*"))
    data = name.read_bytes()
    name.write_bytes((folder / name.name.replace("000001", "000002")).read_bytes())
    with pytest.raises(Gen2EmbedError, match=r"part-000001.* has not 12 rows"):
        Index(folder)
    name.unlink()
    with pytest.raises(Gen2EmbedError, match=r"part-000001.* is missing"):
        Index(folder)
    name.write_bytes(data)
    assert Index(folder).num_vectors == 29


def test_an_index_is_read_block_by_block(folder: Path) -> None:
    assert [len(block.rows) for _, block in Index(folder).blocks()] == [5, 5, 2, 5, 5, 2, 5]
