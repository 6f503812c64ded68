"""A worker of the Ray engine, without Ray: the bytes of its shards, what it refuses, and what it notes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from mmeb_files import write_images
from plain_encoder import PlainEncoder

from gen2embed_mteb.bulk.encoder import BATCHES_PER_SHARD, BulkEncoder
from gen2embed_mteb.bulk.engines import PlannedShard, shard_bar
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item, Opener
from gen2embed_mteb.distributed import options as options_module
from gen2embed_mteb.distributed.encoder import needs_of
from gen2embed_mteb.distributed.options import EngineOptions
from gen2embed_mteb.distributed.pool import Needs
from gen2embed_mteb.distributed.worker import Place, ShardJob, ShardWorker, StoreSetup, read_place
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.cached_images import CachedImages
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource

IDENTITY = {"f": "1"}


class InHere:
    """An encoder whose shards a worker of this process makes, with everything sent as Ray sends it."""

    def __init__(self, suspect: Place | None = None) -> None:
        self.worker, self.suspect = ShardWorker(PlainEncoder()), suspect
        self.encode_query = self.encode_document = PlainEncoder().encode_query
        self.num_encoded = self.num_halvings = 0

    def engine(self, store, opener, num_workers):
        self.store = store
        probe = store.directory / "probe"
        probe.write_text("token")
        self.setup = StoreSetup(str(store.directory), store.identity, opener, num_workers, "", "e", "probe", "token")
        return self

    def make(self, side, missing, label, place):
        self.worker.prepare(pickle.loads(pickle.dumps(self.setup)))
        with shard_bar(missing, label, place) as (_, placed):
            for planned in reversed(missing):
                job = pickle.loads(pickle.dumps(ShardJob(side, planned, f"note-{planned.key[:8]}", self.suspect)))
                self.num_encoded += self.worker.run(job).num_encoded
                assert not (self.store.directory / job.note).exists()
                placed(planned, self.store.get(planned.key))


def stored(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.iterdir() if not path.name.startswith((".", "probe")))
    return {path.name: path.read_bytes() for path in kept}


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    write_images(tmp_path / "img")
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "img").iterdir())
    texts = [Item(f"text {number:03}") for number in range(6 * BATCHES_PER_SHARD)]
    return [*texts, *(Item(f"see {number}", (path,)) for number, path in enumerate(paths))]


@pytest.mark.parametrize("suspect", [None, Place(1), Place(2, 0)])
def test_a_worker_makes_the_bytes_of_one_process_in_any_order(tmp_path: Path, items, suspect) -> None:
    here = BulkEncoder(PlainEncoder(), EmbeddingStore(tmp_path / "a", IDENTITY), ImageSource(tmp_path), batch_size=2)
    there = BulkEncoder(InHere(suspect), EmbeddingStore(tmp_path / "b", IDENTITY), ImageSource(tmp_path), batch_size=2)
    for bulk in (here, there):
        bulk.add("query", items)
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    assert len(stored(tmp_path / "a")) > 5  # several shards
    assert here.num_encoded == there.num_encoded == len(items)
    assert np.array_equal(here.vectors("query", items), there.vectors("query", items))


def test_a_worker_refuses_another_folder_and_other_images(tmp_path: Path, items) -> None:
    store = EmbeddingStore(tmp_path / "e", IDENTITY)
    encoder = InHere()
    bulk = BulkEncoder(encoder, store, ImageSource(tmp_path))
    encoder.setup = StoreSetup(
        str(store.directory), IDENTITY, Opener(ImageSource(tmp_path), ImageOptions()), 1, "", "e", "p"
    )
    with pytest.raises(Gen2EmbedError, match=r"does not see the folder .*output_dir"):
        bulk.add("query", items)
    bulk = BulkEncoder(encoder, store, ImageSource(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    write_images(elsewhere / "img")
    for name in (items[-1].images[0], items[-2].images[0]):
        (elsewhere / name).unlink()
    encoder.setup = StoreSetup(
        str(store.directory), IDENTITY, Opener(ImageSource(elsewhere), ImageOptions()), 1, "", "f", "probe", "token"
    )
    with pytest.raises(Gen2EmbedError, match=r"is not the same on .*image_dir"):
        bulk.add("document", items)


def test_a_shard_that_is_there_already_is_not_made_again(tmp_path: Path) -> None:
    """Its worker may have died between the file and its answer."""
    items = [Item(f"text {number}") for number in range(4)]
    store = EmbeddingStore(tmp_path / "e", IDENTITY)
    encoder = InHere()
    taken: list[PlannedShard] = []
    make = encoder.make
    encoder.make = lambda side, missing, label, place: (taken.extend(missing), make(side, missing, label, place))
    BulkEncoder(encoder, store, ImageSource(tmp_path)).add("query", items)
    assert encoder.worker.run(ShardJob("query", taken[0], "note")) == (0, 0)


def test_what_a_note_says(tmp_path: Path) -> None:
    assert read_place(tmp_path / "none") is None
    (tmp_path / "note").write_text(json.dumps(Place(3, 1)))
    assert read_place(tmp_path / "note") == Place(3, 1)
    (tmp_path / "note").write_text("[3")
    assert read_place(tmp_path / "note") is None


def test_images_are_sent_without_what_was_kept(tmp_path: Path) -> None:
    images = CachedImages(None, tmp_path / "cache")
    write_images(tmp_path / "img")
    name = images.keep(next((tmp_path / "img").iterdir()).read_bytes())
    sent = pickle.loads(pickle.dumps(images))
    assert name.rpartition(":")[2].encode() not in pickle.dumps(images)
    assert sent.facts(name) == images.facts(name)


def test_places_on_nodes() -> None:
    assert Needs(num_cpus=4).places({"CPU": 15.0}) == 3
    assert Needs(num_gpus=1).places({"CPU": 15.0, "GPU": 8.0}) == 8
    assert Needs(num_gpus=1).places({"CPU": 2.0, "GPU": 8.0}) == 2
    assert Needs(num_gpus=1).places({"CPU": 15.0}) == 0
    assert needs_of(None, 6, {"CPU": 8}) == (Needs(num_cpus=6), "cpu")
    assert needs_of(None, 6, {"CPU": 8, "GPU": 1}) == (Needs(num_gpus=1), "cuda")
    assert needs_of("cpu", 6, {"CPU": 8, "GPU": 1}) == (Needs(num_cpus=6), "cpu")
    assert needs_of("cuda:3", 6, {"CPU": 8}) == (Needs(num_gpus=1), "cuda")


def test_options_of_ray_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    EngineOptions().check_engine()
    for extra in ({"ray_address": "host:1"}, {"num_actors": 2}):
        with pytest.raises(Gen2EmbedError, match="belong to --engine ray"):
            EngineOptions(**extra).check_engine()
    with pytest.raises(Gen2EmbedError, match="engine is 'spark'; known: local, ray"):
        EngineOptions(engine="spark").check_engine()
    monkeypatch.setattr(options_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Gen2EmbedError, match=r"pip install 'gen2embed\[ray\]'"):
        EngineOptions(engine="ray").check_engine()
    monkeypatch.setattr(options_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Gen2EmbedError, match="without torchrun"):
        EngineOptions(engine="ray").check_engine()
    assert EngineOptions(engine="ray").loading({"device": "cuda:1", "dtype": "x"}) == {"device": "cpu", "dtype": "x"}
    assert EngineOptions().loading({"device": "cuda:1"}) == {"device": "cuda:1"}
