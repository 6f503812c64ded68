"""The embedding store: what it holds survives, what is damaged is made again, what is another run's is refused."""

import errno
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_encoder import PlainEncoder

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore, Shard, StoreMismatchError
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.errors import is_of_the_system
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.storage import owned_folder
from gen2embed_mteb.storage.atomic import ForeignFileError

VECTORS = np.array([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]], np.float32)
OTHERS = VECTORS[::-1].copy()
KEY = "ab" * 32


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def rewrite_marker(folder: Path, **changes: Any) -> None:
    """Change entries of the marker, and the digest to what the shard now has: what a forger would do."""
    path = folder / f"{KEY[:32]}.json"
    digest = hashlib.sha256(path.with_suffix(".npy").read_bytes()).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": digest, **changes}))


def test_round_trip(tmp_path: Path) -> None:
    given = VECTORS.copy()
    given[1] = 0.0
    EmbeddingStore(tmp_path / "e", {"fingerprint": "m"}).put(KEY, Shard(given, {1: ("a.png", "damaged")}))
    shard = EmbeddingStore(tmp_path / "e", {"fingerprint": "m"}).get(KEY)
    assert shard is not None
    assert np.array_equal(shard.vectors, given)
    assert (shard.num_rows, shard.width) == (3, 2)
    assert shard.vectors.dtype == np.float32
    assert shard.errors == {1: ("a.png", "damaged")}
    assert EmbeddingStore(tmp_path / "e", {"fingerprint": "m"}).get("cd" * 32) is None
    assert visible(tmp_path / "e") == [
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
    assert visible(tmp_path) == ["manifest.json"]


def test_overwrite_keeps_what_fits(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m"}).put(KEY, Shard(VECTORS, {}))
    assert EmbeddingStore(tmp_path, {"fingerprint": "m"}, overwrite=True).get(KEY) is not None


FOREIGN = [
    "",
    "{}",
    "[]",
    '{"format": 99, "identity": {"fingerprint": "m"}, "shards": {}}',
    '{"name": "web app"}',
    "[" * 99999,
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_manifest_is_refused_with_overwrite_too(tmp_path: Path, content: str, overwrite: bool) -> None:
    """The folder of a web app: its manifest, its other JSON and arrays stay, whatever they are called."""
    for name in ("package.json", "mine.npy", f"{'ef' * 16}.npy", f"{'ef' * 16}.json"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "manifest.json").write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ForeignFileError, match=r"manifest\.json"):
        EmbeddingStore(tmp_path, {"fingerprint": "m"}, overwrite=overwrite)
    with pytest.raises(ForeignFileError, match=r"manifest\.json"):
        EmbeddingStore.check(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)} == before


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_manifest_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "manifest.json")
    with pytest.raises(ForeignFileError, match=r"manifest\.json"):
        EmbeddingStore(tmp_path, {"fingerprint": "m"}, overwrite=True)


def test_overwrite_drops_what_is_proved_to_be_ours_and_nothing_else(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    keys = [letter * 64 for letter in "abcd"]
    for key in keys:
        store.put(key, Shard(VECTORS, {}))
    (tmp_path / f"{keys[1][:32]}.npy").write_bytes(b"the user's")  # under a marker of ours
    (tmp_path / f"{keys[2][:32]}.json").write_text('{"key": "of another tool"}')
    (tmp_path / "vectors.npy").write_bytes(b"mine")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / f"{'0' * 32}.json").symlink_to(tmp_path / "notes.json")
    EmbeddingStore(tmp_path, {"fingerprint": "n"}, overwrite=True)
    left = [f"{'0' * 32}.json", f"{keys[1][:32]}.npy", f"{keys[2][:32]}.json", f"{keys[2][:32]}.npy"]
    assert visible(tmp_path) == sorted(["manifest.json", "notes.json", "vectors.npy", *left])
    assert (tmp_path / f"{keys[1][:32]}.npy").read_bytes() == b"the user's"
    assert EmbeddingStore(tmp_path, {"fingerprint": "n"}).get(keys[0]) is None


def test_a_manifest_that_was_edited_is_the_users(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m"}).put(KEY, Shard(VECTORS, {}))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"m"', '"x"'))
    with pytest.raises(ForeignFileError, match="was changed since"):
        EmbeddingStore(tmp_path, {"fingerprint": "n"}, overwrite=True)
    assert len(visible(tmp_path)) == 3


def test_processes_that_overwrite_at_once_clear_once(tmp_path: Path) -> None:
    """Each of four opens the other run's store with overwrite and puts a shard: none clears what another put."""
    EmbeddingStore(tmp_path, {"fingerprint": "old"}).put(KEY, Shard(VECTORS, {}))
    code = """
import sys, numpy as np
from gen2embed_mteb.bulk.store import EmbeddingStore, Shard
store = EmbeddingStore(sys.argv[1], {"fingerprint": "new"}, overwrite=True)
store.put(sys.argv[2] * 64, Shard(np.ones((1, 1), np.float32), {}))
"""
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), letter]) for letter in "1234"]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    store = EmbeddingStore(tmp_path, {"fingerprint": "new"})
    assert [store.get(letter * 64) is not None for letter in "1234"] == [True] * 4
    assert store.get(KEY) is None


def test_a_run_that_began_before_the_store_was_cleared_adds_nothing_to_it(tmp_path: Path) -> None:
    """Its shards would be taken for those of the new model, since the work is the same."""
    old = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    new = EmbeddingStore(tmp_path, {"fingerprint": "n"}, overwrite=True)
    old.put(KEY, Shard(VECTORS, {}))
    assert new.get(KEY) is None
    assert np.array_equal(new.put(KEY, Shard(OTHERS, {})).vectors, OTHERS)
    assert new.get(KEY) is not None
    assert len(visible(tmp_path)) == 3


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
    rewrite_marker(tmp_path)
    assert EmbeddingStore(tmp_path, {"fingerprint": "m"}).get(KEY) is None


CRAFTED = {
    "zeros": np.zeros((3, 2), np.float32),
    "one row of zeros": np.array([[0.6, 0.8], [0, 0], [1, 0]], np.float32),
    "not unit": 3 * VECTORS,
    "NaN": np.full((3, 2), np.nan, np.float32),
    "infinity": np.full((3, 2), np.inf, np.float32),
    "overflow": np.full((3, 2), 3e38, np.float32),
    "float64": VECTORS.astype(np.float64),
    "float16": VECTORS.astype(np.float16),
    "other byte order": VECTORS.astype(">f4"),
    "Fortran": np.asfortranarray(VECTORS),
    "fewer rows": VECTORS[:2],
    "more rows": np.concatenate([VECTORS, VECTORS]),
    "one dimension": np.ones(3, np.float32),
    "three dimensions": VECTORS[:, :, None],
    "no width": np.zeros((3, 0), np.float32),
    "strings": np.array([["a", "b"]] * 3),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_shard_is_not_believed(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its marker has the right digest."""
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    path = tmp_path / f"{KEY[:32]}.npy"
    np.save(path, CRAFTED[name])
    rewrite_marker(tmp_path)
    assert store.get(KEY) is None
    assert "damaged shard" in caplog.text
    # Made again, it counts; what was there is ours by its marker, so that nothing is kept of it.
    assert np.array_equal(store.put(KEY, Shard(VECTORS, {})).vectors, VECTORS)
    assert store.get(KEY, 3) is not None


def test_headers_that_lie_are_not_believed(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    path = tmp_path / f"{KEY[:32]}.npy"
    whole = path.read_bytes()
    for shape in ("(3, -2)", "(-3, -2)", "(999999999999, 9999)", "(3, 2, 0)", "3", "((3, 2)", "(True, 6)"):
        path.write_bytes(whole.replace(b"(3, 2), }" + b" " * len(shape), f"{shape}, }}".encode().ljust(9 + len(shape))))
        rewrite_marker(tmp_path)
        assert store.get(KEY) is None, shape
    for data in (b"", b"PK\x03\x04", whole[:7], b"\x93NUMPY\x02\x00" + whole[8:], whole + b"\0"):
        path.write_bytes(data)
        rewrite_marker(tmp_path)
        assert store.get(KEY) is None, data[:10]


MARKERS: dict[str, dict[str, Any]] = {
    "errors a list": {"errors": []},
    "errors null": {"errors": None},
    "error of no row": {"errors": {"x": ["", "r"]}},
    "error of a row that is not there": {"errors": {"3": ["", "r"]}},
    "error of a negative row": {"errors": {"-1": ["", "r"]}},
    "error with leading zero": {"errors": {"01": ["", "r"]}},
    "error of other digits": {"errors": {"\u0661": ["", "r"]}},
    "error of 5000 digits": {"errors": {"1" * 5000: ["", "r"]}},
    "error a string": {"errors": {"1": "rr"}},
    "error of numbers": {"errors": {"1": [1, 2]}},
    "error of a row that has a vector": {"errors": {"1": ["", "r"]}},
    "rows a string": {"rows": "3"},
    "rows true": {"rows": True},
    "rows a float": {"rows": 3.0},
    "rows negative": {"rows": -3},
    "rows huge": {"rows": 10**30},
    "halvings null": {"num_halvings": None},
    "no name": {"made_by": "somebody"},
    "another format": {"format": 2},
    "version a number": {"version": 1},
    "digest a list": {"sha256": []},
    "digest in capitals": {"sha256": "A" * 64},
    "key null": {"key": None},
    "another entry": {"more": 1},
}


@pytest.mark.parametrize("name", MARKERS)
def test_a_crafted_marker_is_not_believed(tmp_path: Path, name: str) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    rewrite_marker(tmp_path, **MARKERS[name])
    assert store.get(KEY) is None
    assert np.array_equal(store.put(KEY, Shard(VECTORS, {})).vectors, VECTORS)
    assert store.get(KEY, 3) is not None


@pytest.mark.parametrize("content", ["[]", "null", "1", "[" * 99999, '{"rows": 3, "key": "x"}', "\ud800"])
def test_a_marker_that_is_none_is_kept_aside(tmp_path: Path, content: str) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    data = content.encode("utf-8", "surrogatepass")
    (tmp_path / f"{KEY[:32]}.json").write_bytes(data)
    assert store.get(KEY) is None
    store.put(KEY, Shard(VECTORS, {}))
    assert store.get(KEY) is not None
    (kept,) = tmp_path.glob("*.json.set-aside-*")
    assert kept.read_bytes() == data


def test_what_may_be_another_s_is_renamed_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / f"{KEY[:32]}.npy"
    path.write_bytes(b"the user's")
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    assert store.get(KEY) is None
    assert np.array_equal(store.put(KEY, Shard(VECTORS, {})).vectors, VECTORS)
    (kept,) = tmp_path.glob("*.set-aside-*")
    assert kept.read_bytes() == b"the user's"
    # A folder and a pipe likewise; a pipe is not opened, which would block.
    for number, make in enumerate((Path.mkdir, os.mkfifo)):
        key = str(number) * 64
        make(tmp_path / f"{key[:32]}.npy")
        make(tmp_path / f"{key[:32]}.json")
        assert store.get(key) is None
        store.put(key, Shard(VECTORS, {}))
        assert store.get(key) is not None
    assert len(list(tmp_path.glob("*.set-aside-*"))) == 5


def test_fewer_rows_than_the_work_has_are_made_again(tmp_path: Path) -> None:
    encoder, items = PlainEncoder(), [Item("a"), Item("bb"), Item("ccc")]
    BulkEncoder(encoder, EmbeddingStore(tmp_path, {"f": "1"}), ImageSource(tmp_path)).add("query", items)
    marker = tmp_path / visible(tmp_path)[0]
    vectors = np.load(marker.with_suffix(".npy"))
    np.save(marker.with_suffix(".npy"), vectors[:2])
    digest = hashlib.sha256(marker.with_suffix(".npy").read_bytes()).hexdigest()
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "rows": 2, "sha256": digest}))
    bulk = BulkEncoder(encoder, EmbeddingStore(tmp_path, {"f": "1"}), ImageSource(tmp_path))
    bulk.add("query", items)
    assert bulk.num_encoded == 3
    assert bulk.vectors("query", items).shape == vectors.shape


def test_shards_of_unequal_width_are_refused(tmp_path: Path) -> None:
    for width, text in ((8, "a"), (4, "b")):

        class Narrow(PlainEncoder):
            def _encode(self, side: str, inputs: list[dict[str, Any]], width: int = width) -> np.ndarray:
                return np.eye(width, dtype=np.float32)[[0] * len(inputs)]

        BulkEncoder(Narrow(), EmbeddingStore(tmp_path, {"f": "1"}), ImageSource(tmp_path)).add("query", [Item(text)])
    bulk = BulkEncoder(PlainEncoder(), EmbeddingStore(tmp_path, {"f": "1"}), ImageSource(tmp_path))
    for text in "ab":
        bulk.add("query", [Item(text)])
    with pytest.raises(StoreMismatchError, match="unequal widths"):
        bulk.vectors("query", [Item("a"), Item("b")])


def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    """300 shards are made, found again and read where 64 files may be open."""
    code = """
import os, resource, sys
sys.path.insert(0, sys.argv[2])
from plain_encoder import PlainEncoder
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.bulk.store import EmbeddingStore
import gen2embed_mteb.bulk.encoder as encoding
encoding.BATCHES_PER_SHARD = 1
items = [Item(f"text {number}") for number in range(300)]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for _ in range(2):
    store = EmbeddingStore(sys.argv[1], {"f": "1"})
    bulk = BulkEncoder(PlainEncoder(), store, ImageSource(sys.argv[1]), batch_size=1)
    before = len(os.listdir("/proc/self/fd"))
    bulk.add("query", items)
    vectors = bulk.vectors("query", items)
    assert vectors.shape[0] == 300
    assert len(os.listdir("/proc/self/fd")) == before
    print(bulk.num_encoded, bulk.num_reused)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parents[1] / "helpers")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split("\n") == ["300 0", "0 300", ""], done.stderr
    assert len(list(tmp_path.glob("*.npy"))) == 300


def test_an_error_of_the_system_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            store.get(KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert is_of_the_system(caught.value)
    assert "damaged" not in caplog.text
    assert store.get(KEY) is not None


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_failing_disk_is_no_damage(
    tmp_path: Path, number: int, suffix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    stock = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.suffix == suffix:
            raise OSError(number, os.strerror(number), str(path))
        return stock(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match=KEY[:32]) as caught:
        store.get(KEY)
    assert caught.value.errno == number
    with pytest.raises(OSError, match=KEY[:32]):
        store.put(KEY, Shard(OTHERS, {}))
    monkeypatch.undo()
    assert "damaged" not in caplog.text
    assert np.array_equal(store.get(KEY).vectors, VECTORS)


def test_a_whole_store_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EmbeddingStore(tmp_path, {"fingerprint": "m"}).put(KEY, Shard(VECTORS, {}))

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    monkeypatch.setattr(owned_folder, "put", refused)
    shard = EmbeddingStore(tmp_path, {"fingerprint": "m"}, overwrite=True).get(KEY)
    assert np.array_equal(shard.vectors, VECTORS)


def test_a_shard_without_its_marker_does_not_count(tmp_path: Path) -> None:
    """What a kill between the two files leaves."""
    store = EmbeddingStore(tmp_path, {"fingerprint": "m"})
    store.put(KEY, Shard(VECTORS, {}))
    (tmp_path / f"{KEY[:32]}.json").unlink()
    assert store.get(KEY) is None


def test_two_processes_may_write_the_same_store(tmp_path: Path) -> None:
    one, other = (EmbeddingStore(tmp_path, {"fingerprint": "m"}) for _ in range(2))
    one.put(KEY, Shard(VECTORS, {}))
    other.put("cd" * 32, Shard(OTHERS, {}))
    other.put(KEY, Shard(VECTORS, {}))
    for store in (one, other):
        for key, vectors in ((KEY, VECTORS), ("cd" * 32, OTHERS)):
            shard = store.get(key)
            assert shard is not None
            assert np.array_equal(shard.vectors, vectors)


def test_temporary_files_of_killed_processes_go_when_they_are_old(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{name}.npy.0123456789ab.gen2embed-tmp" for name in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    EmbeddingStore(tmp_path, {"fingerprint": "m"})
    assert (old.exists(), new.exists()) == (False, True)
