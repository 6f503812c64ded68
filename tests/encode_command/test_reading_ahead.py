"""The next part is read while one is encoded: how far, and what is left of it on the disk."""

import hashlib
import io
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from encode_jobs import encode, job_of, table, write_lines
from PIL import Image
from plain_encoder import PlainEncoder, vector

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.encode_command.driver import run_job
from gen2embed_mteb.encode_command.row_images import RowImages
from gen2embed_mteb.encode_command.shard import EncodeJob, ShardWorker, encode_part, read_part
from gen2embed_mteb.encode_command.sources import Part


def png(color: Any = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def close(row: dict[str, Any], text: str, *colors: str) -> bool:
    want = vector(text, [Image.new("RGB", (32, 32), color) for color in colors])
    return float(np.abs(np.array(row["vector"], np.float32) - want).max()) < 1e-3  # the encoder's jitter


def waiting(folder: Path) -> set[str]:
    """The embedded images that lie in a folder: files named by their SHA-256."""
    return {path.name for path in folder.rglob("*") if len(path.name) == 64}


class Noting(PlainEncoder):
    """Notes what was read of an input when the model gets its first batch of a text."""

    def __init__(self, read: list[int]) -> None:
        super().__init__()
        self.read, self.read_when_encoding = read, {}

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        part = int(inputs[0]["text"].split()[0])
        deadline = time.monotonic() + 30
        while part not in self.read_when_encoding and max(self.read) <= part < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        self.read_when_encoding.setdefault(part, max(self.read))
        return super()._encode(side, inputs)


def noting(job: EncodeJob, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts of which a row was read, as long as the job runs."""
    read, rows = [-1], type(job.source).rows

    def noted(source: Any, part: Any, limits: Any) -> Any:
        read.append(part.number)
        return rows(source, part, limits)

    monkeypatch.setattr(type(job.source), "rows", noted)
    return read


def test_the_next_part_is_read_while_one_is_encoded_and_none_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(write_lines(tmp_path / "t.jsonl", [{"text": f"{n // 3} {n}"} for n in range(12)]), tmp_path / "o")
    job = replace(job, options=replace(job.options, rows_per_shard=3))
    encoder = Noting(noting(job, monkeypatch))
    run_job(encoder, job, Share())
    assert encoder.read_when_encoding == {0: 1, 1: 2, 2: 3, 3: 3}


def test_an_embedded_picture_of_two_parts_lies_on_the_disk_for_both_and_is_gone_at_the_end(tmp_path: Path) -> None:
    colors = ["red", "red", "red", "blue", "blue", "red"]
    made = pyarrow.table({"text": list("abcdef"), "image": [[{"bytes": png(color)}] for color in colors]})
    pyarrow.parquet.write_table(made, tmp_path / "t.parquet")
    encode(tmp_path / "t.parquet", tmp_path / "o", rows_per_shard=1)
    assert all(close(row, row["text"], color) for row, color in zip(table(tmp_path / "o"), colors, strict=True))
    assert not list((tmp_path / "o").rglob("*images*"))
    job = job_of(tmp_path / "t.parquet", tmp_path / "p", rows_per_shard=2)
    with ShardWorker(PlainEncoder(), job) as worker:
        first, second, third = (read_part(part, worker) for part in job.source.parts(2))
        red, blue = (hashlib.sha256(png(color)).hexdigest() for color in ("red", "blue"))
        assert (first.embedded, second.embedded, third.embedded) == ({red}, {red, blue}, {red, blue})
        encode_part(first, worker)
        encode_part(second, worker)
        assert waiting(tmp_path / "p") == {red, blue}
        encode_part(third, worker)
        assert not waiting(tmp_path / "p")
        pickled = pickle.loads(pickle.dumps(worker.images))  # as for worker processes
        assert worker.images.read(read_part(next(iter(job.source.parts(2))), worker).items[0].images[0]) == png()
        assert pickled.read(f"embedded:{red}") == png()


def test_an_error_ends_the_reading_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Noting):
        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            super()._encode(side, inputs)
            raise RuntimeError("no more")

    job = job_of(
        write_lines(tmp_path / "t.jsonl", [{"text": f"{n} t"} for n in range(4)]), tmp_path / "o", rows_per_shard=1
    )
    read = noting(job, monkeypatch)
    with pytest.raises(RuntimeError, match="no more"):
        run_job(Failing(read), job, Share())
    assert max(read) == 1
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read")]
    assert not list((tmp_path / "o").rglob("*images*"))


def test_slow_images_of_the_next_part_are_given_up_when_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(301):
        (tmp_path / "in" / f"{number:03}.png").write_bytes(png())
    read: list[str] = []
    fetch = RowImages.read

    def slow(images: RowImages, path: str) -> bytes:
        if path > "001":
            time.sleep(0.02)
            read.append(path)
        return fetch(images, path)

    class Failing(PlainEncoder):
        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            deadline = time.monotonic() + 30
            while not read and time.monotonic() < deadline:
                time.sleep(0.005)
            raise KeyboardInterrupt

    monkeypatch.setattr(RowImages, "read", slow)
    job = job_of(tmp_path / "in", tmp_path / "o", rows_per_shard=300)
    parts = list(job.source.parts(300))
    first, rest = parts[0].place[:1], parts[0].place[1:]
    monkeypatch.setattr(type(job.source), "parts", lambda *_: iter([Part(0, 0, 1, first), Part(1, 1, len(rest), rest)]))
    with pytest.raises(KeyboardInterrupt):
        run_job(Failing(), job, Share())
    assert 0 < len(read) < 150


def test_pictures_of_two_parts_are_kept_so_that_each_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number:02}.png").write_bytes(png((number, 0, 0)))
    size = max(path.stat().st_size for path in (tmp_path / "in").iterdir())
    monkeypatch.setattr("gen2embed_mteb.encode_command.row_images.KEPT_BYTES", 3 * size)  # one part
    read: list[str] = []
    fetch = RowImages.read
    monkeypatch.setattr(RowImages, "read", lambda images, path: read.append(path) or fetch(images, path))
    job = job_of(tmp_path / "in", tmp_path / "o", rows_per_shard=3)
    run_job(Noted(read), job, Share())
    assert sorted(read) == [f"{number:02}.png" for number in range(12)]


class Noted(PlainEncoder):
    """Waits with a part until the next one is read: 3 pictures each, 12 in all."""

    def __init__(self, read: list[str]) -> None:
        super().__init__()
        self.read, self.parts = read, 0

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        self.parts += 1
        deadline = time.monotonic() + 30
        while len(self.read) < min(12, 3 * self.parts + 3) and time.monotonic() < deadline:
            time.sleep(0.005)
        return super()._encode(side, inputs)


def test_a_stream_is_read_by_the_thread_that_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "train.jsonl", [{"text": f"{n} t"} for n in range(6)])
    job = job_of(tmp_path / "in", tmp_path / "o", rows_per_shard=2, streaming=True)
    readers: list[str] = []
    rows = type(job.source).rows

    def noted(source: Any, part: Any, limits: Any) -> Any:
        readers.append(threading.current_thread().name)
        return rows(source, part, limits)

    monkeypatch.setattr(type(job.source), "rows", noted)
    run_job(PlainEncoder(), job, Share())
    assert readers == [threading.current_thread().name] * 3
    assert [row["text"] for row in table(tmp_path / "o")] == [f"{n} t" for n in range(6)]
