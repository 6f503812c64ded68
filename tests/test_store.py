"""The embedding store: what it holds survives, what is damaged is made again, what is another run's is refused."""

import json
import logging
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
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [f"{KEY[:32]}.npy", "manifest.json"]


def test_another_identity_is_refused_by_name(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m", "resize": "processor"}).put(KEY, Shard(VECTORS, {}))
    with pytest.raises(StoreMismatchError) as caught:
        EmbeddingStore(tmp_path, {"fingerprint": "m", "resize": "official"})
    assert "resize is 'processor' there and 'official' now" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "fingerprint" not in str(caught.value)
    store = EmbeddingStore(tmp_path, {"fingerprint": "n"}, overwrite=True)
    assert store.get(KEY) is None
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_shards_count_as_missing(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m"}).put(KEY, Shard(VECTORS, {}))
    path = tmp_path / f"{KEY[:32]}.npy"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[:-4]))
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert EmbeddingStore(tmp_path, {"fingerprint": "m"}).get(KEY) is None
    assert "encoded again" in caplog.text


def test_pickled_shards_are_not_loaded(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    path = tmp_path / f"{KEY[:32]}.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    import hashlib

    manifest["shards"][KEY]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert EmbeddingStore(tmp_path, {"fingerprint": "m"}).get(KEY) is None


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
