"""The embedding store: what it holds survives, what is damaged is made again, what is another run's is refused."""

import hashlib
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest

from gen2embed_mteb.store import EmbeddingStore, Shard, StoreMismatchError, write_atomic, write_json

VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2)
KEY = "ab" * 32


def test_round_trip(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path / "e", {"fingerprint": "m"}).put(KEY, Shard(VECTORS, {1: ("a.png", "damaged")}))
    shard = EmbeddingStore(tmp_path / "e", {"fingerprint": "m"}).get(KEY)
    assert shard is not None
    assert np.array_equal(shard.vectors, VECTORS)
    assert shard.vectors.dtype == np.float32
    assert shard.errors == {1: ("a.png", "damaged")}
    assert EmbeddingStore(tmp_path / "e", {"fingerprint": "m"}).get("cd" * 32) is None
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        f"{KEY[:32]}.json",
        f"{KEY[:32]}.npy",
        "manifest.json",
    ]


def test_another_identity_is_refused_by_name(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m", "resize": "processor"}).put(KEY, Shard(VECTORS, {}))
    with pytest.raises(StoreMismatchError) as caught:
        EmbeddingStore(tmp_path, {"fingerprint": "m", "resize": "official"})
    assert "resize is 'processor' there and 'official' now" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "fingerprint" not in str(caught.value)
    store = EmbeddingStore(tmp_path, {"fingerprint": "n"}, overwrite=True)
    assert store.get(KEY) is None
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_overwrite_keeps_what_fits(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m"}).put(KEY, Shard(VECTORS, {}))
    assert EmbeddingStore(tmp_path, {"fingerprint": "m"}, overwrite=True).get(KEY) is not None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 99, "identity": {"fingerprint": "m"}, "shards": {}}'])
def test_unreadable_manifests_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreMismatchError, match="--overwrite"):
        EmbeddingStore(tmp_path, {"fingerprint": "m"})
    EmbeddingStore(tmp_path, {"fingerprint": "m"}, overwrite=True).put(KEY, Shard(VECTORS, {}))
    assert EmbeddingStore(tmp_path, {"fingerprint": "m"}).get(KEY) is not None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "marker", "other work"])
def test_damaged_shards_count_as_missing(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m"}).put(KEY, Shard(VECTORS, {}))
    path = tmp_path / f"{KEY[:32]}.npy"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[:-4]))
    elif damage == "remove":
        path.unlink()
    elif damage == "marker":
        path.with_suffix(".json").write_text('{"key": ')
    else:
        marker = path.with_suffix(".json")
        marker.write_text(marker.read_text().replace(KEY, KEY[:32] + "cd" * 16))
    with caplog.at_level(logging.WARNING):
        assert EmbeddingStore(tmp_path, {"fingerprint": "m"}).get(KEY) is None
    assert "encoded again" in caplog.text


def test_pickled_shards_are_not_loaded(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    path = tmp_path / f"{KEY[:32]}.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    marker = json.loads(path.with_suffix(".json").read_text())
    marker["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(marker))
    assert EmbeddingStore(tmp_path, {"fingerprint": "m"}).get(KEY) is None


def test_a_shard_without_its_marker_does_not_count(tmp_path: Path) -> None:
    """What a kill between the two files leaves."""
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    (tmp_path / f"{KEY[:32]}.json").unlink()
    assert store.get(KEY) is None


def test_two_processes_may_write_the_same_store(tmp_path: Path) -> None:
    one, other = (EmbeddingStore(tmp_path, {"fingerprint": "m"}) for _ in range(2))
    one.put(KEY, Shard(VECTORS, {}))
    other.put("cd" * 32, Shard(VECTORS + 1, {}))
    other.put(KEY, Shard(VECTORS, {}))
    for store in (one, other):
        for key, vectors in ((KEY, VECTORS), ("cd" * 32, VECTORS + 1)):
            shard = store.get(key)
            assert shard is not None
            assert np.array_equal(shard.vectors, vectors)


def test_temporary_files_of_killed_processes_go_when_they_are_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.npy.1.tmp", tmp_path / ".b.npy.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    EmbeddingStore(tmp_path, {"fingerprint": "m"})
    assert (old.exists(), new.exists()) == (False, True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert list(tmp_path.iterdir()) == [path]
