"""Which texts stage 1 reads, and which rows it leaves out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.errors import Gen2EmbedError
from trainers.data.training_data import open_training_data
from trainers.distillation.texts import TextConfig, read_texts


def read(place, tmp_path, **options):
    config = TextConfig(data_dir=str(place), **options)
    return read_texts(open_training_data(config, tmp_path / "cache"), config)


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_pairs_are_rows_of_two_texts(tmp_path):
    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "b", "positive": "c"}, {"anchor": "a", "positive": "a"}]
    texts = read(lines(tmp_path / "pairs.jsonl", rows), tmp_path)
    assert texts.distinct == ["a", "b", "c"]
    assert texts.rows.tolist() == [[0, 1], [1, 2], [0, 0]]
    assert texts.places.tolist() == [0, 1, 3]
    assert (texts.num_places, texts.width, texts.columns) == (6, 2, ["query", "positive"])


@pytest.mark.parametrize(("name", "options"), [("text", {}), ("sentence", {}), ("gloss", {"columns": ("gloss",)})])
def test_single_texts_are_rows_of_one(tmp_path, name, options):
    table = pa.table({name: ["a", "b", "a"], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "texts.parquet")
    texts = read(tmp_path / "texts.parquet", tmp_path, **options)
    assert (texts.distinct, texts.rows.tolist(), texts.columns) == (["a", "b"], [[0], [1], [0]], ["text"])


def test_two_columns_can_be_named_as_those_of_nli(tmp_path):
    rows = [{"sent0": "a", "sent1": "b", "hard_neg": "c"}]
    texts = read(lines(tmp_path / "nli.jsonl", rows), tmp_path, columns=("sent0", "sent1"))
    assert texts.distinct == ["a", "b"]


def test_faulty_rows_are_left_out_but_have_a_place(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    rows = [{"text": "a"}, "{no json", {"text": {"image": "a.png", "text": "b"}}, {"text": "  "}, {"text": "e"}]
    path = lines(tmp_path / "texts.jsonl", rows)
    texts = read(path, tmp_path, max_error_rate=0.9)
    assert texts.distinct == ["a", "e"]
    assert texts.places.tolist() == [0, 4]
    assert texts.num_places == 5
    assert [row.index for row in texts.rejected] == [1, 2, 3]
    assert "it has an image, and stage 1 reads texts alone" in [row.reason for row in texts.rejected]
    with pytest.raises(DataError, match=r"3 of 5 rows cannot be used; the first: .*texts.jsonl: line 2: no JSON"):
        read(path, tmp_path)


def test_subsets_of_two_kinds_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "single.jsonl", [{"text": "a"}])
    lines(tmp_path / "data" / "pairs.jsonl", [{"anchor": "a", "positive": "b"}])
    with pytest.raises(DataError, match="single has single texts, other subsets have pairs"):
        read(tmp_path / "data", tmp_path)
    assert read(tmp_path / "data", tmp_path, subsets=("single",)).distinct == ["a"]


def test_other_columns_are_refused_with_those_that_are_there(tmp_path):
    path = lines(tmp_path / "texts.jsonl", [{"gloss": "a"}])
    said = r"no columns anchor \(or query\) and positive, nor text \(or sentence\); it has gloss. Name one or two"
    with pytest.raises(DataError, match=said):
        read(path, tmp_path)
    with pytest.raises(DataError, match="no columns text; it has gloss"):
        read(path, tmp_path, columns=("text",))
    with pytest.raises(Gen2EmbedError, match="columns is"):
        TextConfig(data_dir=str(path), columns=("a", "b", "c"))


def test_the_digest_is_that_of_the_rows(tmp_path):
    def digest(*rows):
        return read(lines(tmp_path / "texts.jsonl", [{"anchor": a, "positive": b} for a, b in rows]), tmp_path).digest()

    assert digest(("a", "b"), ("c", "d")) == digest(("a", "b"), ("c", "d"))
    assert len({digest(("a", "b"), ("c", "d")), digest(("c", "d"), ("a", "b")), digest(("ab", "c"), ("c", "d"))}) == 3
