"""Encoding in parts: vectors of every row, bad rows set aside, the same bytes however it went, no file lost."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from encode_jobs import content, encode, errors, forked, job_of, table, texts, write_lines
from peak_memory import peak_memory
from PIL import Image
from plain_encoder import DIMENSIONS, PlainEncoder, vector

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.encode_command.driver import run_job
from gen2embed_mteb.encode_command.report import read_manifest, write_reports
from gen2embed_mteb.encode_command.shard import ShardWorker, encode_shard
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import ForeignFileError


def png(color: Any = "red", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def close(row: dict[str, Any], text: str, *colors: str) -> bool:
    want = vector(text, [Image.new("RGB", (32, 32), color) for color in colors])
    return float(np.abs(np.array(row["vector"], np.float32) - want).max()) < 1e-3  # the encoder's jitter


def test_every_row_has_the_vector_of_its_text(tmp_path: Path) -> None:
    rows = texts(60)
    encoder = PlainEncoder()
    outcome = encode(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "o", encoder, rows_per_shard=25)
    found = table(tmp_path / "o")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["row"] for row in found] == list(range(60))
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert all(close(row, row["text"]) for row in found)
    distinct = [len({row["text"] for row in rows[start : start + 25]}) for start in (0, 25, 50)]
    assert sum(encoder.given.values()) == sum(distinct)  # each once in each part
    assert outcome.manifest["counts"] == {"rows": 60, "vectors": 60, "errors": 0}
    assert outcome.manifest["vectors"]["dimensions"] == DIMENSIONS
    assert errors(tmp_path / "o") == []
    schema = pyarrow.parquet.read_schema(tmp_path / "o" / "part-000000.parquet")
    assert schema.field("vector").type == pyarrow.list_(pyarrow.float32(), DIMENSIONS)
    assert json.loads(schema.metadata[b"gen2embed"])["fingerprint"] == "f"


def test_pictures_embedded_in_a_path_or_in_several(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "blue.png").write_bytes(png("blue"))
    images = [
        [{"bytes": png(), "path": "r"}],
        [{"path": "blue.png"}, {"bytes": png()}],
        [{"bytes": b"no"}],
        [],
        [{"path": "gone.png"}],
    ]
    made = pyarrow.table({"text": ["a", None, "c", "d", "e"], "image": images, "id": [5, 5, 7, 8, 9]})
    pyarrow.parquet.write_table(made, tmp_path / "in" / "t.parquet")
    encode(tmp_path / "in", tmp_path / "o", rows_per_shard=2, kind="parquet")
    found = table(tmp_path / "o")
    assert [(row["row"], row["id"], row["text"], row["images"]) for row in found] == [
        (0, "5", "a", []),
        (1, "5", "", ["blue.png"]),  # ids need not be unique; row numbers are
        (3, "8", "d", []),
    ]
    assert close(found[0], "a", "red")
    assert close(found[1], "", "blue", "red")
    assert close(found[2], "d")
    faults = errors(tmp_path / "o")
    assert [(fault["row"], fault["id"]) for fault in faults] == [(2, "7"), (4, "9")]
    assert "not one of JPEG" in faults[0]["reason"]
    assert faults[1]["file"] == "gone.png"
    assert not list((tmp_path / "o").rglob("*images*"))  # nothing of the embedded ones is left


@pytest.mark.parametrize("turned", [False, True])
def test_embedded_pictures_are_turned_as_those_with_a_path(tmp_path: Path, turned: bool) -> None:
    """Pictures of 40 x 30 pixels whose EXIF data says that they lie."""
    picture, buffer = Image.new("RGB", (40, 30), "red"), io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(buffer, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    made = pyarrow.table({"image": [{"path": "a.jpg", "bytes": None}, {"path": None, "bytes": buffer.getvalue()}]})
    pyarrow.parquet.write_table(made, tmp_path / "t.parquet")
    encoder = PlainEncoder()
    encode(tmp_path / "t.parquet", tmp_path / "o", encoder, exif_orientation=turned)
    assert encoder.given == {("document", "", ((30, 40) if turned else (40, 30),)): 1}  # one picture, encoded once
    assert table(tmp_path / "o")[0]["vector"] == table(tmp_path / "o")[1]["vector"]


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in ("b/ü x.png", "a.png", "b/deep/er/c.PNG"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(png("blue" if "ü" in name else "red"))
    (tmp_path / "p" / "empty.jpg").write_bytes(b"")
    outcome = encode(tmp_path / "p", tmp_path / "o", max_error_rate=0.2)
    found = table(tmp_path / "o")
    assert [row["id"] for row in found] == ["a.png", "b/deep/er/c.PNG", "b/ü x.png"]
    assert set(found[0]) == {"row", "id", "vector"}
    assert close(found[2], "", "blue")
    assert errors(tmp_path / "o")[0]["id"] == "empty.jpg"
    assert outcome.too_many_errors
    assert outcome.verdict == (
        "Failed: 1 of 4 rows were set aside, see errors.jsonl; that is more than --max_error_rate 0.2"
    )


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_npy_holds_what_parquet_holds(tmp_path: Path, precision: str) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(20))
    options = {"precision": precision, "truncate_dim": 100, "rows_per_shard": 12}
    encode(data, tmp_path / "p", **options)
    encode(data, tmp_path / "n", file_format="npy", **options)
    for number in range(2):
        rows = pyarrow.parquet.read_table(tmp_path / "p" / f"part-{number:06}.parquet").to_pylist()
        values = np.load(tmp_path / "n" / f"part-{number:06}.npy")
        told = [json.loads(line) for line in (tmp_path / "n" / f"part-{number:06}.jsonl").read_text().splitlines()]
        assert values.dtype == precision
        assert values.shape == (len(rows), 100)
        assert [list(row.pop("vector")) for row in rows] == values.tolist()
        assert told == rows
        lengths = np.linalg.norm(values.astype(np.float32), axis=1)
        if precision == "int8":
            lengths *= [row["scale"] for row in rows]
        assert np.abs(lengths - 1).max() < {"float32": 1e-6, "float16": 1e-3, "int8": 5e-3}[precision]


def test_the_second_run_encodes_nothing_and_changes_nothing(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", [*texts(30), "{broken"])
    encode(data, tmp_path / "o", rows_per_shard=8)
    before, times = content(tmp_path / "o"), {p: p.stat().st_mtime_ns for p in (tmp_path / "o").glob("part*")}
    encoder = PlainEncoder()
    encode(data, tmp_path / "o", encoder, rows_per_shard=8)
    assert not encoder.given
    assert content(tmp_path / "o") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "o").glob("part*")} == times


def test_what_is_damaged_or_changed_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    rows = texts(32)
    data = write_lines(tmp_path / "t.jsonl", rows)
    encode(data, tmp_path / "o", rows_per_shard=8)
    before = content(tmp_path / "o")
    damaged = tmp_path / "o" / "part-000001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    encoder = PlainEncoder()
    encode(data, tmp_path / "o", encoder, rows_per_shard=8)
    kept = [path for path in (tmp_path / "o").iterdir() if ".set-aside-" in path.name]
    assert len(kept) == 1  # it is not proved to be ours any more, so that it is not deleted
    kept[0].unlink()
    assert content(tmp_path / "o") == before
    assert {text for _, text, _ in encoder.given} == {row["text"] for row in rows[8:16]}

    rows[20]["text"] = "another text"
    encoder = PlainEncoder()
    encode(write_lines(data, rows[:30]), tmp_path / "o", encoder, rows_per_shard=8)
    assert {text for _, text, _ in encoder.given} == {row["text"] for row in rows[16:30]}
    assert [row["text"] for row in table(tmp_path / "o")] == [row["text"] for row in rows[:30]]
    encode(write_lines(data, rows[:10]), tmp_path / "o", encoder, rows_per_shard=8)
    assert len(table(tmp_path / "o")) == 10  # parts beyond the last one are gone
    assert read_manifest(tmp_path / "o")["counts"]["rows"] == 10


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(10))
    encode(data, tmp_path / "o")
    other = write_lines(tmp_path / "u.jsonl", texts(10))
    for said, path, options in (
        ("precision is 'float32' there and 'int8' now", data, {"precision": "int8"}),
        ("side is 'document' there and 'query' now", data, {"side": "query"}),
        ("fingerprint is 'f' there and 'g' now", data, {"fingerprint": "g"}),
        ("input is .*t.jsonl' there and .*u.jsonl' now", other, {}),
    ):
        with pytest.raises(StoreMismatchError, match=f"{said}.*--overwrite"):
            job_of(path, tmp_path / "o", **options)
    encode(data, tmp_path / "o", precision="int8", overwrite=True)
    assert read_manifest(tmp_path / "o")["vectors"]["precision"] == "int8"
    assert pyarrow.parquet.read_schema(tmp_path / "o" / "part-000000.parquet").names[-1] == "scale"


def test_files_of_others_stay(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(10))
    output = tmp_path / "o"
    job_of(data, output)
    (output / "part-000000.parquet").write_bytes(b"mine")  # put there after the run began
    (output / "notes.txt").write_text("mine")
    encode(data, output)
    kept = [path.read_bytes() for path in output.iterdir() if ".set-aside-" in path.name]
    assert kept == [b"mine"]
    assert (output / "notes.txt").read_text() == "mine"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "manifest.json").write_text("{}")
    with pytest.raises(ForeignFileError, match=r"manifest\.json was not written by gen2embed"):
        job_of(data, tmp_path / "m")


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_run_that_is_killed_anywhere_ends_in_the_same_bytes(tmp_path: Path, step: int) -> None:
    data = write_lines(tmp_path / "t.jsonl", [*texts(22), "{broken"])
    encode(data, tmp_path / "whole", rows_per_shard=8)
    want = content(tmp_path / "whole")
    output = tmp_path / "o"
    output.mkdir()
    status, count = forked(lambda: encode(data, output, rows_per_shard=8), output)
    assert status == 0
    assert content(output) == want
    assert count > 20
    for number in range(1, count + 1, step):
        for path in sorted(output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        assert forked(lambda: encode(data, output, rows_per_shard=8), output, number)[0] == 9
        assert not (output / "manifest.json").exists() or number > count - 8
        encode(data, output, rows_per_shard=8)
        left = {name: value for name, value in content(output).items() if ".gen2embed-tmp" not in name}
        assert left == want, number


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(60))
    encode(data, tmp_path / "one", rows_per_shard=8)
    output = tmp_path / "two"

    def process(rank: int) -> None:
        job = job_of(data, output, rows_per_shard=8)
        run = run_job(PlainEncoder(0.02), job, Share(rank, 2, poll_interval=0.01))
        assert 0 < run.num_encoded < 60
        if rank == 0:
            write_reports(job, run.num_parts, {"name": "plain"}, run.checked)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            process(1)
            status = 0
        finally:
            os._exit(status)
    process(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert content(output) == content(tmp_path / "one")


def test_the_parts_of_a_dead_process_are_made_by_the_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(40))
    encode(data, tmp_path / "one", rows_per_shard=8)
    job = job_of(data, tmp_path / "two", rows_per_shard=8)
    run = run_job(PlainEncoder(), job, Share(0, 2, patience=0.05, poll_interval=0.01))
    write_reports(job, run.num_parts, {"name": "plain"}, run.checked)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert "taken for dead" in caplog.text


def test_a_marker_from_before_of_other_content_is_not_taken_for_made(tmp_path: Path) -> None:
    """The input changed in the part of the other process, which never comes: the part is made here."""
    rows = texts(16)
    data = write_lines(tmp_path / "t.jsonl", rows)
    encode(data, tmp_path / "o", rows_per_shard=8)
    rows[12]["text"] = "another text"
    job = job_of(write_lines(data, rows), tmp_path / "o", rows_per_shard=8)
    run = run_job(PlainEncoder(), job, Share(0, 2, patience=0.05, poll_interval=0.01))
    write_reports(job, run.num_parts, {"name": "plain"}, run.checked)
    assert table(tmp_path / "o")[12]["text"] == "another text"


def test_parts_and_jobs_go_to_any_worker_in_any_order(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(30))
    encode(data, tmp_path / "one", rows_per_shard=8)
    job = job_of(data, tmp_path / "other", rows_per_shard=8)
    sent, parts = pickle.dumps(job), [pickle.dumps(part) for part in job.source.parts(8)]
    assert all(len(part) < 1000 for part in parts)
    for part in reversed(parts):
        with ShardWorker(PlainEncoder(), pickle.loads(sent)) as worker:
            record = encode_shard(pickle.loads(part), worker)
            assert encode_shard(pickle.loads(part), worker) == record  # idempotent
            assert len(pickle.dumps(record)) < 1000
    write_reports(job, len(parts), {"name": "plain"})
    assert content(tmp_path / "other") == content(tmp_path / "one")


def test_reports_need_every_part(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(20))
    job = job_of(data, tmp_path / "o", rows_per_shard=8)
    with ShardWorker(PlainEncoder(), job) as worker:
        encode_shard(next(job.source.parts(8)), worker)
    with pytest.raises(Gen2EmbedError, match="part 1 is missing or damaged"):
        write_reports(job, 3, {})
    with pytest.raises(Gen2EmbedError, match=r"no manifest\.json in it"):
        read_manifest(tmp_path / "o")


def test_rows_that_vanish_while_it_runs_are_noticed(tmp_path: Path) -> None:
    rows = texts(20)
    job = job_of(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "o", rows_per_shard=8)
    parts = list(job.source.parts(8))
    write_lines(tmp_path / "t.jsonl", rows[:18])
    with ShardWorker(PlainEncoder(), job) as worker, pytest.raises(Gen2EmbedError, match="part 2 has 2 rows now, 4"):
        encode_shard(parts[2], worker)


def test_a_part_without_a_good_row_and_one_row_alone(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", ["{a", "{b", {"text": "c"}])
    encode(data, tmp_path / "o", rows_per_shard=2)
    assert [path.name for path in (tmp_path / "o").glob("part-*")] == ["part-000001.parquet"]
    assert [row["id"] for row in table(tmp_path / "o")] == ["2"]
    assert [error["row"] for error in errors(tmp_path / "o")] == [0, 1]


def test_an_input_that_the_model_refuses_is_set_aside_alone(tmp_path: Path) -> None:
    class Refusing(PlainEncoder):
        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            if any(entry["text"] == "bad" for entry in inputs):
                raise ValueError("this one is too long")
            return super()._encode(side, inputs)

    data = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in ("a", "bad", "b", "bad")])
    encode(data, tmp_path / "o", Refusing())
    assert [row["text"] for row in table(tmp_path / "o")] == ["a", "b"]
    assert [(error["row"], error["reason"]) for error in errors(tmp_path / "o")] == [
        (row, "refused by the encoder: this one is too long") for row in (1, 3)
    ]


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    """10,000 rows in parts of 500, in a process of its own, whose peak is compared with that of 2,000."""

    def peak(count: int) -> int:
        data = write_lines(tmp_path / f"{count}.jsonl", ({"text": f"{n} " + "w" * 300} for n in range(count)))
        output = tmp_path / f"o{count}"
        script = tmp_path / f"peak{count}"

        def run() -> None:
            job = job_of(data, output, rows_per_shard=500, batch_size=500)
            with ShardWorker(Quick(), job) as worker:
                for part in job.source.parts(500):
                    encode_shard(part, worker)
            script.write_text(str(peak_memory()))

        assert forked(run)[0] == 0
        return int(script.read_text())

    assert peak(10_000) - peak(2000) < 4 * 2**20  # the vectors alone are 8 MB more


class Quick(PlainEncoder):
    """Random unit vectors of 256 numbers."""

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        made = np.random.default_rng(len(inputs)).standard_normal((len(inputs), 256)).astype(np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)
