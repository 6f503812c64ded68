"""What `sample` writes is read back as it was, and what is damaged or made of other data is refused."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.mmeb.readers import BadRow, TrainRow
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.sampling.files import (
    RowsDigest,
    SampledClusters,
    SamplingError,
    read_official,
    read_record,
    read_sampling,
    write_official,
    write_sampling,
)

CLUSTERS = SampledClusters(
    anchors=np.array([0, 4, 2]),
    members=np.array([[3, 1], [5, -1], [0, 3]]),
    phase=np.array([1, 1, 2]),
    similarities=np.array([[0.25, 0.5], [0.75, np.nan], [-1.0, 1.0]], dtype=np.float32),
)
ROWS = [
    {
        "qry": f"query {number}",
        "qry_image_path": f"q{number}.png",
        "pos_text": f"label {number % 3}",
        "pos_image_path": "",
        "neg_text": "",
        "neg_image_path": "",
    }
    for number in range(6)
]


def record(**changes):
    return {
        "subset": "Colours",
        "method": "saha",
        "settings": {"num_hard_negatives": 2},
        "data": {
            "data_dir": "data",
            "image_dir": "",
            "source": "colours.parquet",
            "split": "original",
            "columns": [],
            "image_columns": [],
            "limit": None,
            "num_rows": 6,
            "digest": "d",
        },
        "model": {"name": "m", "revision": "", "prompt_mode": "none", "fingerprint": "f"},
        "counts": counts(clusters=3, short=1),
        "seconds": {"encode": 0.0, "mine": 0.0},
        **changes,
    }


def counts(clusters, short):
    others = ("rows", "queries", "candidates", "errors", "phase_1", "phase_2", "reused")
    return {"clusters": clusters, "short": short, **dict.fromkeys(others, 0)}


def same(one, other):
    for name in ("anchors", "members", "phase", "similarities"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("name", ["Colours.parquet", "Colours.json"])
def test_round_trip(tmp_path, name):
    write_sampling(tmp_path, record(), CLUSTERS)
    read = read_sampling(tmp_path / name)
    same(read.clusters, CLUSTERS)
    assert read.record["method"] == "saha"
    read.require_data("d")


def test_the_parquet_file_is_as_documented(tmp_path):
    write_sampling(tmp_path, record(), CLUSTERS)
    table = pq.read_table(tmp_path / "Colours.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "anchor": "int64",
        "members": "list<element: int64>",
        "phase": "int8",
        "similarities": "list<element: float>",
    }
    assert table.slice(1, 1).to_pylist() == [{"anchor": 4, "members": [5], "phase": 1, "similarities": [0.75]}]


def test_equal_clusters_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_sampling(tmp_path / name, record(), CLUSTERS)
    assert (tmp_path / "a" / "Colours.parquet").read_bytes() == (tmp_path / "b" / "Colours.parquet").read_bytes()


def test_no_clusters_and_no_members(tmp_path):
    nobody = np.zeros((0, 0), dtype=np.int64)
    empty = SampledClusters(nobody.ravel(), nobody, nobody.ravel(), nobody.astype(np.float32))
    write_sampling(tmp_path, record(counts=counts(0, 0)), empty)
    assert read_sampling(tmp_path / "Colours.json").clusters.anchors.shape == (0,)
    alone = SampledClusters(np.arange(6), np.zeros((6, 0), np.int64), np.ones(6, np.int64), np.zeros((6, 0), "f4"))
    in_batch = record(method="in-batch", settings={"num_hard_negatives": 0}, counts=counts(6, 0))
    write_sampling(tmp_path, in_batch, alone)
    same(read_sampling(tmp_path / "Colours.parquet").clusters, alone)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


WRONG = {
    "format 9": lambda path: edit(path, lambda content: content.update(format=9)),
    'method is "best", must be one of saha, hn': lambda path: edit(path, lambda content: content.update(method="best")),
    "no record": lambda path: path.write_text('{"format": 1'),
    "sha256 is missing": lambda path: edit(path, lambda content: content.pop("sha256")),
    "not found": lambda path: path.unlink(),
    "damaged, its checksum": lambda path: path.with_suffix(".parquet").write_bytes(b"PAR1 no PAR1"),
    "cannot be read": lambda path: path.with_suffix(".parquet").unlink(),
    "cluster 1 names row 5, but the data has 5": lambda path: edit(
        path, lambda content: content["data"].update(num_rows=5)
    ),
    "do not match": lambda path: edit(path, lambda content: content["settings"].update(num_hard_negatives=1)),
}


@pytest.mark.parametrize("said", WRONG)
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path, said):
    write_sampling(tmp_path, record(), CLUSTERS)
    WRONG[said](tmp_path / "Colours.json")
    with pytest.raises(SamplingError, match=said) as caught:
        read_sampling(tmp_path / "Colours.json")
    assert "Colours." in str(caught.value)
    assert "gen2embed sample" in str(caught.value)


def test_a_file_of_another_method_or_of_other_rows_is_refused(tmp_path):
    write_sampling(tmp_path, record(method="hn"), CLUSTERS)
    with pytest.raises(SamplingError, match="sampled with --method hn, needed is saha"):
        read_sampling(tmp_path / "Colours.parquet", methods=("saha",))
    with pytest.raises(SamplingError, match=r"made with other rows.*colours.parquet, split 'original'"):
        read_sampling(tmp_path / "Colours.parquet").require_data("e")


def test_a_parquet_file_that_is_no_sampling_is_refused(tmp_path):
    import hashlib

    import pyarrow as pa

    write_sampling(tmp_path, record(), CLUSTERS)
    parquet = tmp_path / "Colours.parquet"
    for table, said in (
        (pa.table({"anchor": [1]}), "not a file of clusters"),
        (pa.table({"anchor": [1], "members": [[2, 2]], "phase": [1], "similarities": [[0.0, 0.0]]}), "a row twice"),
        (pa.table({"anchor": [1], "members": [[2]], "phase": [3], "similarities": [[0.0]]}), "neither 1 nor 2"),
    ):
        pq.write_table(table, parquet)
        digest = hashlib.sha256(parquet.read_bytes()).hexdigest()
        changes = {"sha256": digest, "counts": counts(1, int(table.num_columns > 1 and table["phase"][0].as_py() == 3))}
        edit(tmp_path / "Colours.json", lambda content, changes=changes: content.update(changes))
        with pytest.raises(SamplingError, match=said):
            read_sampling(parquet)


def test_the_record_goes_first_and_comes_last(tmp_path, monkeypatch):
    """Killed between the two, a subset is unfinished: not finished with the old record, not damaged."""
    write_sampling(tmp_path, record(), CLUSTERS)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(OwnedFolder, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_sampling(tmp_path, record(), CLUSTERS)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["Colours.parquet"]


KILLS = """
import os, pathlib, sys
import pyarrow.parquet
from test_files_of_sampling import CLUSTERS, record
from trainers.sampling.files import write_sampling

folder, steps = pathlib.Path(sys.argv[1]), 0

def dying(stock, at):
    def call(*args, **kwargs):
        global steps
        steps += 1
        if steps == at:
            os._exit(9)
        return stock(*args, **kwargs)
    return call

def forked(seconds, at=0):
    child = os.fork()
    if child == 0:
        os.fsync, pathlib.Path.replace, pathlib.Path.unlink = (dying(call, at) for call in stock)
        write_sampling(folder, record(seconds={"encode": seconds, "mine": 0.0}), CLUSTERS)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

stock = os.fsync, pathlib.Path.replace, pathlib.Path.unlink
killed = 0
while forked(1.0, killed + 1) == 9:
    killed += 1
    assert forked(2.0) == 0, killed
print(killed)
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_killed_at_any_step_the_next_run_replaces_its_own_files(tmp_path):
    """Every fsync, rename and unlink is a place to be killed at."""
    folder = tmp_path / "out"
    write_sampling(folder, record(), CLUSTERS)
    bytes_of_clusters = (folder / "Colours.parquet").read_bytes()
    shutil.copy(__file__, tmp_path / "test_files_of_sampling.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(folder)], capture_output=True, text=True, env=environment, check=True
    )
    assert int(run.stdout) >= 8
    assert (folder / "Colours.parquet").read_bytes() == bytes_of_clusters
    assert read_sampling(folder / "Colours.json").record["seconds"]["encode"] == 1.0
    assert OwnedFolder(folder, "sample").owns("Colours.parquet")
    assert OwnedFolder(folder, "sample").owns("Colours.json")


HUGE = 10**12
DAMAGE = {
    "k is null": ("settings", "num_hard_negatives", None),
    "k is a text": ("settings", "num_hard_negatives", "2"),
    "k is a trillion": ("settings", "num_hard_negatives", HUGE),
    "k is negative": ("settings", "num_hard_negatives", -1),
    "k is zero": ("settings", "num_hard_negatives", 0),
    "k is true": ("settings", "num_hard_negatives", True),
    "k is a fraction": ("settings", "num_hard_negatives", 2.0),
    "k is in range and wrong": ("settings", "num_hard_negatives", 9999),
    "subset is a list": (None, "subset", ["Colours"]),
    "subset leads out": (None, "subset", "../Colours"),
    "subset is empty": (None, "subset", ""),
    "subset has a surrogate": (None, "subset", "\ud83d"),
    "subset is null": (None, "subset", None),
    "method is a list": (None, "method", ["saha"]),
    "file leads out": (None, "file", "../Colours.parquet"),
    "file is a list": (None, "file", ["Colours.parquet"]),
    "file is the record": (None, "file", "Colours.json"),
    "sha256 is a number": (None, "sha256", 7),
    "format is a text": (None, "format", "1"),
    "format is true": (None, "format", True),
    "settings is a list": (None, "settings", []),
    "data is null": (None, "data", None),
    "model is a text": (None, "model", "gen2embed"),
    "counts is a list": (None, "counts", [1]),
    "seconds is null": (None, "seconds", None),
    "num_rows is a text": ("data", "num_rows", "6"),
    "num_rows is huge": ("data", "num_rows", 10**30),
    "num_rows is NaN": ("data", "num_rows", float("nan")),
    "limit is zero": ("data", "limit", 0),
    "limit is a list": ("data", "limit", []),
    "data_dir is null": ("data", "data_dir", None),
    "data_dir has a null byte": ("data", "data_dir", "a\0b"),
    "digest is a list": ("data", "digest", []),
    "columns is a text": ("data", "columns", "ab"),
    "columns hold numbers": ("data", "columns", [1, 2]),
    "columns is an object": ("data", "columns", {}),
    "image_columns is null": ("data", "image_columns", None),
    "split is a number": ("data", "split", 1),
    "model name is null": ("model", "name", None),
    "fingerprint is an object": ("model", "fingerprint", {}),
    "a count is a text": ("counts", "rows", "6"),
    "a count is negative": ("counts", "errors", -1),
    "another count is null": ("counts", "more", None),
    "clusters are fewer": ("counts", "clusters", 2),
    "seconds are a text": ("seconds", "encode", "fast"),
    "seconds are infinite": ("seconds", "mine", float("inf")),
    "beta is a text": ("settings", "beta", "0.02"),
    "pool is negative": ("settings", "pool_multiplier", -6),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_field_is_named_in_one_line(tmp_path, damage):
    section, field, value = DAMAGE[damage]
    write_sampling(tmp_path, record(), CLUSTERS)
    edit(
        tmp_path / "Colours.json",
        lambda content: (content if section is None else content[section]).update({field: value}),
    )
    with pytest.raises(SamplingError) as caught:
        read_sampling(tmp_path / "Colours.parquet")
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert len(said) < 400 + len(str(tmp_path))
    assert "Colours." in said
    assert "run gen2embed sample again" in said
    assert (f"{section}.{field}" if section else field) in said or "with k = " in said or "clusters" in said


REQUIRED_FIELDS = [
    (section, field)
    for section, fields in record().items()
    if isinstance(fields, dict)
    for field in fields
    if (section, field) != ("counts", "collapsed")
]


@pytest.mark.parametrize(("section", "field"), REQUIRED_FIELDS)
def test_a_missing_field_is_named_when_it_is_read_and_when_it_is_written(tmp_path, section, field):
    write_sampling(tmp_path, record(), CLUSTERS)
    edit(tmp_path / "Colours.json", lambda content: content[section].pop(field))
    with pytest.raises(SamplingError, match=rf"Colours\.json.*{section}\.{field} is missing"):
        read_sampling(tmp_path / "Colours.parquet")
    lacking = {**record(), section: {name: value for name, value in record()[section].items() if name != field}}
    with pytest.raises(ValueError, match=f"{section}.{field} is missing"):
        write_sampling(tmp_path / "new", lacking, CLUSTERS)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"1", b'"saha"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b" " * (1 << 21)],
    ids=["empty", "null", "list", "number", "text", "object", "no UTF-8", "deep list", "deep object", "large"],
)
def test_what_is_no_record_at_all_is_one_line(tmp_path, content):
    write_sampling(tmp_path, record(), CLUSTERS)
    (tmp_path / "Colours.json").write_bytes(content)
    with pytest.raises(SamplingError, match=r"Colours\.json: no record of a sampling run") as caught:
        read_sampling(tmp_path / "Colours.parquet")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("file", ["Colours.json", "Colours.parquet"])
def test_pipes_folders_and_devices_are_no_sampling_files(tmp_path, file):
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")):
        write_sampling(tmp_path / "out", record(), CLUSTERS)
        (tmp_path / "out" / file).unlink()
        make(tmp_path / "out" / file)
        with pytest.raises(SamplingError, match=f"{file}: no regular file"):
            read_sampling(tmp_path / "out" / "Colours.parquet")
        shutil.rmtree(tmp_path / "out")


def test_nulls_and_texts_in_the_clusters_are_refused(tmp_path):
    import hashlib

    import pyarrow as pa

    whole = {"anchor": [1], "members": [[2, 3]], "phase": [1], "similarities": [[0.5, 0.5]]}
    for change in (
        {"anchor": [None]},
        {"anchor": ["1"]},
        {"anchor": [1.5]},
        {"members": [None]},
        {"members": [[2, None]]},
        {"members": [["2", "3"]]},
        {"members": [2]},
        {"members": [[2, 3, 4]]},
        {"members": [[2, 2**63 - 1]]},
        {"members": [[2, -7]]},
        {"phase": [None]},
        {"similarities": [[0.5, None]]},
        {"similarities": [["a", "b"]]},
        {"similarities": [[0.5]]},
    ):
        write_sampling(tmp_path / "out", record(), CLUSTERS)
        parquet = tmp_path / "out" / "Colours.parquet"
        pq.write_table(pa.table({**whole, **change}), parquet)
        changes = {"sha256": hashlib.sha256(parquet.read_bytes()).hexdigest(), "counts": counts(1, 0)}
        edit(parquet.with_suffix(".json"), lambda content, changes=changes: content.update(changes))
        with pytest.raises(SamplingError, match=r"Colours\.parquet"):
            read_sampling(parquet)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("file", ["Colours.parquet", "Colours.json", "Colours_hard_negatives.json"])
def test_what_others_made_is_neither_replaced_nor_removed(tmp_path, file):
    (tmp_path / file).write_bytes(b"the user's")
    writes = {
        "Colours_hard_negatives.json": lambda: write_official(tmp_path / file, CLUSTERS, ROWS, "saha"),
    }
    with pytest.raises(ForeignFileError, match=file):
        writes.get(file, lambda: write_sampling(tmp_path, record(), CLUSTERS))()
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == [file]
    assert (tmp_path / file).read_bytes() == b"the user's"


def test_a_user_s_official_file_stays_when_clusters_are_replaced(tmp_path):
    write_sampling(tmp_path, record(), CLUSTERS)
    (tmp_path / "Colours_hard_negatives.json").write_bytes(b"of the official code")
    write_sampling(tmp_path, record(), CLUSTERS)
    assert (tmp_path / "Colours_hard_negatives.json").read_bytes() == b"of the official code"


def test_the_official_form_of_saha(tmp_path):
    path = tmp_path / "Colours_hard_negatives.json"
    write_official(path, CLUSTERS, ROWS, "saha")
    entries = json.loads(path.read_text())
    assert entries[0] == {**ROWS[0], "neg_samples": [ROWS[3], ROWS[1]]}
    assert [len(entry["neg_samples"]) for entry in entries] == [2, 1, 2]
    method, read = read_official(path, ROWS)
    assert method == "saha"
    np.testing.assert_array_equal(read.anchors, CLUSTERS.anchors)
    np.testing.assert_array_equal(read.members, CLUSTERS.members)
    np.testing.assert_array_equal(read.phase, [1, 1, 2])  # cluster 2 is the first to repeat a row
    assert np.isnan(read.similarities).all()


def test_the_official_form_of_hard_negatives(tmp_path):
    path = tmp_path / "Colours_hard_negatives.json"
    negatives = SampledClusters(np.array([0]), np.array([[1, 2]]), np.array([1]), np.zeros((1, 2), np.float32))
    write_official(path, negatives, ROWS, "hn")
    (entry,) = json.loads(path.read_text())
    assert entry["neg_text"] == ["label 1", "label 2"]
    assert entry["neg_image_path"] == ["", ""]
    method, read = read_official(path, ROWS)
    assert method == "hn"
    assert read.members.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="--format parquet"):
        write_official(path, negatives, ROWS, "in-batch")


def test_official_rows_that_are_repeated_mean_the_last_and_unknown_ones_are_refused(tmp_path):
    path = tmp_path / "Colours_hard_negatives.json"
    path.write_text(json.dumps([{**ROWS[0], "neg_samples": [ROWS[1]]}]))
    _, read = read_official(path, [*ROWS, ROWS[0]])
    assert read.anchors.tolist() == [6]
    with pytest.raises(SamplingError, match=r"entry 0.*not in this training data"):
        read_official(path, ROWS[1:])
    for content in ([1, 2], [{"qry": "q", "neg_samples": []}]):
        path.write_text(json.dumps(content))
        with pytest.raises(SamplingError, match="not in the official form"):
            read_official(path, ROWS)


def test_the_digest_tells_rows_apart():
    def digest(*rows):
        made = RowsDigest()
        for row in rows:
            made.add(row)
        return made.hexdigest()

    row = TrainRow(0, Item("a", ("x.png",)), Item("b"), None)
    others = (
        TrainRow(1, Item("a", ("x.png",)), Item("b"), None),
        TrainRow(0, Item("a", ("y.png",)), Item("b"), None),
        TrainRow(0, Item("a", ("x.png",)), Item("c"), None),
        BadRow(0, "", "why"),
    )
    assert digest(row) == digest(row)
    assert len({digest(row), digest(row, row), digest(), *map(digest, others)}) == 7


def test_read_record_alone(tmp_path):
    write_sampling(tmp_path, record(), CLUSTERS)
    assert read_record(tmp_path / "Colours.json")["file"] == "Colours.parquet"


def test_the_old_import_path_stays():
    from trainers.saha import files as old
    from trainers.sampling import files as new

    assert old.read_sampling is new.read_sampling
    with pytest.raises(AttributeError):
        _ = old.no_such_name
