"""Several processes on one store: who makes what, and that a dead one is made up for."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mmeb_files import write_images
from plain_encoder import PlainEncoder

from gen2embed_mteb.bulk.encoder import BATCHES_PER_SHARD, BulkEncoder
from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.bulk.store import EmbeddingStore, Shard
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.source import ImageSource

# As `run_encoding.py` makes them in its own process.
ITEMS = [Item(f"text {number:03}") for number in range(8 * BATCHES_PER_SHARD)]
WORKER = Path(__file__).parents[1] / "helpers" / "run_encoding.py"


def start(folder: Path, rank: int, world_size: int, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return subprocess.Popen([sys.executable, str(WORKER), str(folder), *arguments], env=environment)


def store_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "e").iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, 0, 1).wait(60) == 0
    return store_bytes(folder)


def test_the_environment_says_which_share() -> None:
    assert Share.from_environment({}) == Share(0, 1)
    assert Share.from_environment({"RANK": "2", "WORLD_SIZE": "4"}) == Share(2, 4)
    assert [[n for n in range(7) if Share(rank, 3).owns(n)] for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="RANK is 3, WORLD_SIZE 3"):
        Share.from_environment({"RANK": "3", "WORLD_SIZE": "3"})


def test_two_processes_make_each_shard_once_and_both_have_all_vectors(tmp_path: Path, whole: dict[str, bytes]) -> None:
    workers = [start(tmp_path, rank, 2, "0.01") for rank in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert store_bytes(tmp_path) == whole
    encoded = [int((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)]
    assert encoded == [len(ITEMS) // 2] * 2
    assert np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))


@pytest.mark.parametrize("wait", [0.2, 0.5, 0.9])
@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], wait: float
) -> None:
    worker = start(tmp_path, 0, 1, "0.01")
    deadline = time.monotonic() + 60
    while not (tmp_path / "e").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(wait)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait(60) == -signal.SIGKILL
    made = {name: data for name, data in store_bytes(tmp_path).items() if name.endswith(".json")}
    assert made.items() <= whole.items()  # what counts as complete is right already
    assert len(made) < len([name for name in whole if name.endswith(".json")])
    assert start(tmp_path, 0, 1).wait(60) == 0
    assert store_bytes(tmp_path) == whole


def test_the_shards_of_a_process_that_died_are_made_by_another(tmp_path: Path) -> None:
    write_images(tmp_path / "img")
    encoder, store = PlainEncoder(), EmbeddingStore(tmp_path / "e", {"f": "1"})
    share = Share(0, 2, patience=0.3, poll_interval=0.05)
    bulk = BulkEncoder(encoder, store, ImageSource(tmp_path), batch_size=1, share=share)
    bulk.add("query", ITEMS)
    assert bulk.num_encoded == len(ITEMS)
    assert bulk.vectors("query", ITEMS).shape[0] == len(ITEMS)


def test_awaited_shards_come_as_they_appear(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, {"f": "1"})
    keys = [letter * 64 for letter in "abc"]
    store.put(keys[1], Shard(np.ones((1, 1), np.float32), {}))
    peers = Peers(Share(0, 2, patience=0.1, poll_interval=0.02))
    awaited = peers.await_others({key: 2 * index + 1 for index, key in enumerate(keys)}, store.get)
    assert next(awaited)[0] == keys[1]
    assert next(awaited) == (keys[0], None)
    store.put(keys[2], Shard(np.ones((2, 1), np.float32), {}))
    key, shard = next(awaited)
    assert (key, shard is not None) == (keys[2], True)
    assert list(awaited) == []


def test_a_dead_process_is_waited_for_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After one patience its part of every later piece of work is made at once; that is said once."""
    encoder, store = PlainEncoder(), EmbeddingStore(tmp_path / "e", {"f": "1"})
    share = Share(0, 2, patience=0.3, poll_interval=0.01)
    sleeps: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        stock = time.sleep
        patch.setattr(time, "sleep", lambda seconds: (sleeps.append(seconds) if seconds else None, stock(seconds)))
        bulk = BulkEncoder(encoder, store, ImageSource(tmp_path), batch_size=1, share=share)
        with caplog.at_level(logging.WARNING, "gen2embed_mteb.bulk.processes"):
            bulk.add("query", ITEMS)
            first = len(sleeps)
            for number in range(3):
                bulk.add("document", [Item(f"{item.text} {number}") for item in ITEMS])
    assert first > 1
    assert len(sleeps) == first
    assert bulk.num_encoded == 4 * len(ITEMS)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" of 2 ")[0] for message in messages if "taken for dead" in message] == ["process 1"]
    assert sum("waiting for process 1 of 2" in message for message in messages) == 1


def test_a_process_that_was_only_slow_is_alive_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = EmbeddingStore(tmp_path, {"f": "1"})
    keys = [letter * 64 for letter in "abcd"]
    one = Shard(np.ones((1, 1), np.float32), {})
    peers = Peers(Share(0, 2, patience=0.05, poll_interval=0.01))
    assert list(peers.await_others({keys[0]: 1}, store.get)) == [(keys[0], None)]
    store.put(keys[1], one)
    with caplog.at_level(logging.WARNING):
        assert [key for key, found in peers.await_others({keys[1]: 1}, store.get) if found] == [keys[1]]
    assert "process 1 of 2 is back" in caplog.text
    # Of three, the other survivor may have made it: that is no sign of life.
    peers = Peers(Share(0, 3, patience=0.05, poll_interval=0.01))
    assert list(peers.await_others({keys[2]: 1}, store.get)) == [(keys[2], None)]
    store.put(keys[2], one)
    caplog.clear()
    list(peers.await_others({keys[2]: 1}, store.get))
    assert "is back" not in caplog.text
    assert list(peers.await_others({keys[3]: 1}, store.get)) == [(keys[3], None)]


def test_survivors_begin_at_different_shards_of_a_dead_process(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, {"f": "1"})
    numbers = {f"{number:064x}": number for number in (1, 4, 7, 10, 13, 16)}  # all of rank 1 of 3
    firsts = [
        next(Peers(Share(rank, 3, patience=0.02, poll_interval=0.01)).await_others(numbers, store.get))
        for rank in (0, 2)
    ]
    assert [found for _, found in firsts] == [None, None]
    assert [numbers[key] for key, _ in firsts] == [1, 13]


@pytest.mark.parametrize("rank", ["", "one", "0.5"])
def test_a_rank_that_is_no_number_is_named(rank: str) -> None:
    with pytest.raises(Gen2EmbedError, match="whole numbers"):
        Share.from_environment({"RANK": rank, "WORLD_SIZE": "2"})
