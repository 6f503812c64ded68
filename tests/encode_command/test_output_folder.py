"""The output folder of `gen2embed encode`: apart from the input, and nothing of others in it is touched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from encode_jobs import content, encode, job_of, texts, write_lines
from PIL import Image
from plain_encoder import PlainEncoder

from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.encode_command.parts_folder import INSIDE
from gen2embed_mteb.encode_command.shard import ShardWorker
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.held_folder import remove_abandoned


@pytest.mark.parametrize("kind", ["tables", "pictures", "saved", "a part"])
def test_an_output_folder_that_would_be_read_as_input_is_refused(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    output = data
    if kind == "pictures":
        Image.new("RGB", (8, 8)).save(data / "a.png")
    elif kind == "saved":
        datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(data)
        output = data / "out"
    else:
        write_lines(data / "part-000000.jsonl", [{"text": "a"}])
    before = content(data)
    asked = data / "part-000000.jsonl" if kind == "a part" else data
    with pytest.raises(DataError, match="pass another --output_dir"):
        job_of(asked, tmp_path / "link" / ".." / output.relative_to(tmp_path))
    assert content(data) == before


def test_an_output_folder_beside_or_below_the_input_is_none_of_it(tmp_path: Path) -> None:
    """Also when the command is given again."""
    table_file = write_lines(tmp_path / "data" / "t.jsonl", [{"text": "a"}, {"text": "b"}])
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a.png")
    for data, output, kind in (
        (table_file, tmp_path / "data", ""),
        (tmp_path / "data", tmp_path / "data" / "of tables", "jsonl"),
        (tmp_path / "data", tmp_path / "data" / "of pictures", "pictures"),
    ):
        first = encode(data, output, kind=kind)
        assert first.num_rows == (1 if kind == "pictures" else 2)
        assert encode(data, output, kind=kind).manifest == first.manifest
        shutil.rmtree(tmp_path / "data" / ".gen2embed-encode", ignore_errors=True)
        for path in [*tmp_path.glob("data/part-*"), *tmp_path.glob("data/*.json"), *tmp_path.glob("data/errors.jsonl")]:
            path.unlink()


def test_files_of_others_with_the_names_of_parts_are_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", texts(3))
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "part-000007.npy").write_bytes(b"of the user")
    with pytest.raises(ForeignFileError, match=r"part-000007\.npy has the name of a part of this run"):
        job_of(data, tmp_path / "o")
    assert [path.name for path in (tmp_path / "o").iterdir() if path.name != INSIDE] == ["part-000007.npy"]
    assert (tmp_path / "o" / "part-000007.npy").read_bytes() == b"of the user"


@pytest.mark.parametrize("how", ["another run", "fewer rows"])
def test_a_part_that_a_killed_run_left_without_its_marker_is_not_among_the_parts(tmp_path: Path, how: str) -> None:
    """Whoever reads `part-*.parquet` must not find it."""
    rows, output = texts(6), tmp_path / "o"
    data = write_lines(tmp_path / "t.jsonl", rows)
    encode(data, output, rows_per_shard=3)
    stray = (output / "part-000001.parquet").read_bytes()
    (output / INSIDE / "part-000001.json").unlink()
    data = write_lines(tmp_path / "t.jsonl", rows[:3])
    options = {"fingerprint": "another", "overwrite": True} if how == "another run" else {}
    assert encode(data, output, rows_per_shard=3, **options).num_rows == 3
    assert [path.name for path in output.glob("part-*.parquet")] == ["part-000000.parquet"]
    assert [path.read_bytes() for path in output.glob("part-*.set-aside-*")] == [stray]


def test_what_another_host_left_must_be_a_day_old(tmp_path: Path) -> None:
    """Its lock may not be seen here."""
    folder = tmp_path / ".images.0123456789ab.gen2embed-tmp"
    folder.mkdir()
    (folder / "held.lock").touch()
    (folder / "host").write_text("another host")
    remove_abandoned(tmp_path)
    assert folder.exists()
    os.utime(folder, (0, 0))
    remove_abandoned(tmp_path)
    assert not folder.exists()


LEFT = """
import os, sys
from gen2embed_mteb.encode_command.parts_folder import PartsFolder
with PartsFolder(sys.argv[1], {}).scratch() as folder:
    (folder / "image").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.readline()
    os._exit(9)
"""


def test_embedded_images_stay_while_their_process_lives_and_not_a_moment_longer(tmp_path: Path) -> None:
    """However old their folder is, and however young."""
    job = job_of(write_lines(tmp_path / "t.jsonl", texts(3)), tmp_path / "o")
    with subprocess.Popen(
        [sys.executable, "-c", LEFT, str(tmp_path / "o")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        os.utime(folder, (0, 0))
        with ShardWorker(PlainEncoder(), job):  # of this process
            job.folder().begin(overwrite=False)
            assert (folder / "image").read_bytes() == b"x"
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.wait() == 9
            assert folder.exists()
            job.folder().begin(overwrite=False)
            assert not folder.exists()
            assert len(list((tmp_path / "o" / INSIDE).glob(".*.gen2embed-tmp"))) == 1
    assert not list((tmp_path / "o" / INSIDE).glob(".*.gen2embed-tmp"))
