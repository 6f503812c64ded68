"""Shards of scored pairs: every bit comes back, and nothing that is not whole and ours is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gen2embed_mteb.bulk.pair_store import PairStore, ScoredRow, ScoredShard

ROWS = (
    ScoredRow((float(np.float32(0.1)), -1e-30, 3.0), 6, 0.1 + 0.2, 4, 70, 100),
    ScoredRow(fault=("a.png", "it is damaged")),
)
SHARD = ScoredShard(ROWS, 1.5)


def test_a_shard_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = PairStore(tmp_path, "identity")
    key = store.key(["work"])
    assert store.get(key, [3, 2]) is None
    store.put(key, SHARD)
    assert PairStore(tmp_path, "identity").get(key, [3, 2]) == SHARD
    assert store.put(key, ScoredShard(ROWS, 9.0)) == SHARD  # the first one is kept
    assert store.get(key, [4, 2]) is None  # of other work
    assert store.key(["other"]) != key != PairStore(tmp_path, "other").key(["work"])


@pytest.mark.parametrize("damage", ["cut", "score", "row", "list", "key"])
def test_a_damaged_shard_is_not_used_and_is_written_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = PairStore(tmp_path, "identity")
    key = store.key(["work"])
    store.put(key, SHARD)
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    if damage == "score":
        content["rows"][0]["scores"][0] = 0.2
    elif damage == "row":
        content["rows"].pop()
    elif damage == "key":
        content["key"] = "0" * 64
    path.write_text("[]" if damage == "list" else json.dumps(content)[: 40 if damage == "cut" else None])
    assert store.get(key, [3, 2]) is None
    assert "its pairs are scored again" in caplog.text
    store.put(key, SHARD)
    assert store.get(key, [3, 2]) == SHARD
    assert len(list(tmp_path.glob("*.set-aside-*"))) == 1  # it is nobody's to delete
