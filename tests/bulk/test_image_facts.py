"""Digests of image files: read once, shared by processes, remembered, and never of a file that has changed."""

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plain_encoder import PlainEncoder

from gen2embed_mteb.bulk import image_facts
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Fault, Item
from gen2embed_mteb.images.cached_images import CachedImages
from gen2embed_mteb.images.decoding import ImageFacts
from gen2embed_mteb.images.kept_bytes import KeptBytes
from gen2embed_mteb.images.source import ImageSource

NAMES = [f"{number}.png" for number in range(10)]


class Counted(ImageSource):
    """Counts how often each file is read, and for its facts alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def facts(self, path: str) -> ImageFacts:
        self.asked[path] += 1
        return super().facts(path)

    def read(self, path: str) -> bytes:
        self.reads[path] += 1
        return super().read(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        write(folder / name, number)
    return folder


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images count as many, and their age as enough."""
    monkeypatch.setattr(image_facts, "MANY", 2)
    monkeypatch.setattr(image_facts, "CHUNK", 3)
    monkeypatch.setattr(image_facts, "_RACY_NS", -(10**18))


def write(path: Path, color: int) -> None:
    Image.new("RGB", (30, 30), (color, 0, 0)).save(path)


def bulk(folder: Path, images: Any = None, **options: Any) -> BulkEncoder:
    images = images if images is not None else Counted(folder)
    return BulkEncoder(PlainEncoder(), EmbeddingStore(folder.parent / "e", {}), images, batch_size=2, **options)


ITEMS = [Item("", (name,)) for name in NAMES]


def test_every_file_of_small_data_is_read_once(folder: Path) -> None:
    images = Counted(folder)
    one = bulk(folder, images)
    one.add("query", ITEMS)
    one.add("document", [*ITEMS, Item("a text", (NAMES[0],))])
    assert images.reads == dict.fromkeys(NAMES, 1)


def test_files_are_kept_up_to_a_limit_and_the_last_used_stay() -> None:
    kept = KeptBytes(10)
    for name in "abc":
        kept.put(name, name.encode() * 3)
    assert kept.get("a") == b"aaa"
    kept.put("d", b"dd")  # b was used longest ago
    kept.put("large", b"x" * 11)
    assert [kept.get(name) for name in ("a", "b", "c", "d", "large")] == [b"aaa", None, b"ccc", b"dd", None]
    kept.put("a", b"a" * 8)
    assert [kept.get(name) for name in "acd"] == [b"a" * 8, None, b"dd"]


@pytest.mark.usefixtures("many")
def test_a_run_that_follows_reads_nothing(folder: Path) -> None:
    (folder / "0.png").write_bytes(b"no picture")
    first = bulk(folder)
    first.add("query", [*ITEMS, Item("", ("missing.png",))])
    files = sorted((folder.parent / "e").glob("images-*.json"))
    assert len(files) == 4  # of three images each
    before = [file.read_bytes() for file in files]
    images = Counted(folder)
    second = bulk(folder, images)
    second.add("query", [*ITEMS, Item("", ("missing.png",))])
    assert images.reads == {"0.png": 1, "missing.png": 1}  # what is wrong is looked at again
    assert second.num_encoded == 0
    assert [second.fault("query", item) for item in ITEMS] == [first.fault("query", item) for item in ITEMS]
    assert np.array_equal(second.vectors("query", ITEMS[1:]), first.vectors("query", ITEMS[1:]))
    assert [file.read_bytes() for file in files] == before


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_that_was_changed_is_read_again(folder: Path, keeps_time: bool) -> None:
    """Also if a tool sets the time of the change back, and the size is the same."""
    bulk(folder).add("query", ITEMS)
    was = (folder / "4.png").stat()
    write(folder / "4.png", 200)
    if keeps_time:
        assert (folder / "4.png").stat().st_size == was.st_size
        os.utime(folder / "4.png", ns=(was.st_atime_ns, was.st_mtime_ns))
    images = Counted(folder)
    second = bulk(folder, images)
    second.add("query", ITEMS)
    assert images.asked == {"4.png": 1}
    fresh = bulk(folder.parent / "other" / "pictures", ImageSource(folder))
    fresh.add("query", ITEMS)
    assert np.abs(second.vectors("query", ITEMS) - fresh.vectors("query", ITEMS)).max() < 1e-5
    third = Counted(folder)
    bulk(folder, third).add("query", ITEMS)
    assert not third.reads


def test_a_file_that_is_too_young_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_facts, "MANY", 2)
    bulk(folder).add("query", ITEMS)
    images = Counted(folder)
    bulk(folder, images).add("query", ITEMS)
    assert images.reads == dict.fromkeys(NAMES, 1)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("change", ["cut", "digest", "foreign"])
def test_a_damaged_file_of_facts_is_not_believed(folder: Path, change: str) -> None:
    bulk(folder).add("query", ITEMS)
    file = min((folder.parent / "e").glob("images-*.json"))
    content = json.loads(file.read_bytes())
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif change == "digest":
        other = json.loads(file.read_bytes())
        next(iter(other["images"].values()))[1] = "0" * 32
        file.write_text(json.dumps(other))
    else:
        file.write_text("mine")
    images = Counted(folder)
    again = bulk(folder, images)
    again.add("query", ITEMS)
    assert images.reads == dict.fromkeys(content["images"], 1)
    assert again.num_encoded == 0
    kept = list((folder.parent / "e").glob("*.set-aside-*"))
    assert len(kept) == 1
    assert json.loads(file.read_bytes())["images"] == content["images"]


@pytest.mark.usefixtures("many")
def test_processes_share_the_reading(folder: Path) -> None:
    sources = [Counted(folder) for _ in range(2)]
    shares = [Share(rank, 2, poll_interval=0.01) for rank in range(2)]
    bulks = [bulk(folder, source, share=share) for source, share in zip(sources, shares, strict=True)]
    threads = [threading.Thread(target=one.add, args=("query", ITEMS)) for one in bulks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert np.array_equal(bulks[0].vectors("query", ITEMS), bulks[1].vectors("query", ITEMS))
    digests = [{path: source._kept.get(path) is not None for path in NAMES} for source in sources]
    assert sorted(digests[0].items() | digests[1].items()) == sorted(digests[0].items() ^ digests[1].items())
    assert sum(digests[0].values()) == 6  # the first and the third chunk; the fourth has one image
    assert sum(digests[1].values()) == 4


def test_a_file_that_changes_while_it_is_in_use_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeptBytes, "put", lambda *_: None)
    stock = ImageSource.read

    def changing(self: ImageSource, path: str) -> bytes:
        data = stock(self, path)
        if path == "3.png":
            write(folder / path, 99)
        return data

    monkeypatch.setattr(ImageSource, "read", changing)
    one = bulk(folder, ImageSource(folder))
    one.add("query", ITEMS)
    faults = {item.images[0]: fault for item in ITEMS if (fault := one.fault("query", item))}
    assert faults == {"3.png": Fault("3.png", "was changed while it was in use")}


def test_stamps_of_archives_and_of_embedded_images(folder: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in NAMES[:2]:
            archive.write(folder / name, name)
    archived = ImageSource(tmp_path / "a.zip")
    assert archived.stamp("0.png") != archived.stamp("1.png")
    assert archived.stamp("0.png") == ImageSource(tmp_path / "a.zip").stamp("0.png")
    cached = CachedImages(folder, tmp_path / "cache")
    path = cached.keep((folder / "0.png").read_bytes())
    assert cached.stamp(path)[3] == (folder / "0.png").stat().st_size
    assert cached.stamp("0.png") == ImageSource(folder).stamp("0.png")
