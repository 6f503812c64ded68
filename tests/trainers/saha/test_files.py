"""What `sample` writes is read back as it was, and what is damaged or made of other data is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from gen2embed_mteb.encoder import Item
from gen2embed_mteb.mmeb.readers import BadRow, TrainRow
from trainers.saha.files import (
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
        "data": {"source": "colours.parquet", "split": "original", "limit": None, "num_rows": 6, "digest": "d"},
        "model": {"fingerprint": "f"},
        "counts": {"errors": 0},
        **changes,
    }


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
    write_sampling(tmp_path, record(), empty)
    assert read_sampling(tmp_path / "Colours.json").clusters.anchors.shape == (0,)
    alone = SampledClusters(np.arange(6), np.zeros((6, 0), np.int64), np.ones(6, np.int64), np.zeros((6, 0), "f4"))
    write_sampling(tmp_path, record(method="in-batch", settings={"num_hard_negatives": 0}), alone)
    same(read_sampling(tmp_path / "Colours.parquet").clusters, alone)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


WRONG = {
    "format 9": lambda path: edit(path, lambda content: content.update(format=9)),
    "method 'best'": lambda path: edit(path, lambda content: content.update(method="best")),
    "no record": lambda path: path.write_text('{"format": 1'),
    "KeyError": lambda path: edit(path, lambda content: content.pop("sha256")),
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
        edit(tmp_path / "Colours.json", lambda content, digest=digest: content.update(sha256=digest))
        with pytest.raises(SamplingError, match=said):
            read_sampling(parquet)


def test_the_record_goes_first_and_comes_last(tmp_path, monkeypatch):
    """Killed between the two, a subset is unfinished: not finished with the old record, not damaged."""
    from trainers.saha import files

    write_sampling(tmp_path, record(), CLUSTERS)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_sampling(tmp_path, record(), CLUSTERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Colours.parquet"]


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
