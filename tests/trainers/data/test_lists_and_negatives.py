"""Data with several positives per query, or with explicit negatives: what is read, and what is set aside."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.data_files.rows import BadRow
from gen2embed_mteb.mmeb.readers import TrainRow
from trainers.data.config import DataConfig
from trainers.data.training_data import open_training_data


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> list[TrainRow | BadRow]:
    data = open_training_data(DataConfig(data_dir=str(path), **options), path.parent / "cache")
    return list(data.subsets[0].rows())


def texts(items: tuple[Item, ...]) -> list[str]:
    return [item.text for item in items]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


ROWS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"positive": "p"}, ["p"], []),
    ({"positive": ["p", "o", "p"]}, ["p", "o"], []),
    ({"positive": ["p", {"text": "o"}], "negative": "n"}, ["p", "o"], ["n"]),
    ({"positive": "p", "negative": ["n", "m", "n"]}, ["p"], ["n", "m"]),
    ({"positive": "p", "negative_10": "c", "negative_2": "b", "negative_1": "a"}, ["p"], ["a", "b", "c"]),
    ({"positive": "p", "negative": ["z"], "negative_1": None, "negative_2": "b"}, ["p"], ["z", "b"]),
    ({"positive": "p", "negative": [], "negative_1": "", "negative_2": {"text": None, "image": []}}, ["p"], []),
    ({"positive": "p", "negative_0": "x", "negative_01": "y", "negatives": "z"}, ["p"], []),
]


@pytest.mark.parametrize(("row", "positives", "negatives"), ROWS)
def test_lists_and_columns(tmp_path: Path, row: dict[str, Any], positives: list[str], negatives: list[str]) -> None:
    (found,) = read(write_lines(tmp_path / "pairs.jsonl", [{"anchor": "q", **row}]))
    assert isinstance(found, TrainRow)
    assert (texts(found.positives), texts(found.negatives)) == (positives, negatives)


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"positive": []}, "positive is an empty list; a query needs a positive"),
    ({"positive": ["p", None]}, "positive[1] is null, not a text"),
    ({"positive": ["p", 7]}, "positive[1] is int, not a text"),
    ({"positive": ["p", ["o"]]}, "positive[1] is list, not a text"),
    ({"positive": ["p", ""]}, "positive[1] has neither text nor image"),
    ({"positive": "p", "negative": 7}, "negative is int, not a text"),
    ({"positive": "p", "negative": ["n", None]}, "negative[1] is null, not a text"),
    ({"positive": "p", "negative": {"txt": "n"}}, "negative: unknown key 'txt'"),
    ({"positive": "p", "negative_2": "p"}, "negative_2 is also a positive of the row (positive)"),
    ({"positive": ["o", "p"], "negative": ["n", "p"]}, "negative[1] is also a positive of the row (positive[1])"),
    ({"anchor": ["q"], "positive": "p"}, "anchor is list, not a text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [{"anchor": "q", "positive": "p"}, {"anchor": "q", **row}])
    good, bad = read(path)
    assert isinstance(good, TrainRow)
    assert isinstance(bad, BadRow)
    assert (bad.index, bad.file) == (1, str(path))
    assert reason in bad.reason


def test_a_list_beyond_the_limit_is_set_aside(tmp_path: Path) -> None:
    rows = [{"anchor": "q", "positive": ["p", "o"]}, {"anchor": "q", "positive": ["p", "o", "n"]}]
    good, bad = read(write_lines(tmp_path / "pairs.jsonl", rows), max_candidates=2)
    assert isinstance(good, TrainRow)
    assert isinstance(bad, BadRow) and "positive has 3 entries, more than max_candidates 2" in bad.reason


def test_lists_of_images_in_parquet_and_in_saved_datasets(tmp_path: Path) -> None:
    stored = [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]
    columns = {"query": ["q", "r"], "positive": [stored, stored[:1]], "negative_1": [None, stored[1]]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "pairs.parquet", tmp_path / "saved"):
        first, second = read(path)
        assert isinstance(first, TrainRow) and isinstance(second, TrainRow)
        assert [len(item.images) for item in (*first.positives, *second.positives)] == [1, 1, 1]
        assert first.positive == second.positive != first.more_positives[0] == second.negatives[0]
        assert first.negatives == ()


def test_paths_in_lists_and_in_the_columns_of_negatives_are_those_of_the_positives_column(tmp_path: Path) -> None:
    rows = [{"anchor": "q.png", "positive": ["a.png", "b.png"], "negative": "c.png"}]
    (row,) = read(write_lines(tmp_path / "pairs.jsonl", rows), image_columns=("positive",))
    assert isinstance(row, TrainRow)
    assert row.query == Item("q.png")
    assert row.positives == (Item("", ("a.png",)), Item("", ("b.png",)))
    assert row.negatives == (Item("", ("c.png",)),)


def test_without_them_rows_are_read_as_before(tmp_path: Path) -> None:
    rows = [{"anchor": "q", "positive": "p", "negative": "n"}, {"anchor": "q", "positive": ["p"]}]
    good, bad = read(write_lines(tmp_path / "pairs.jsonl", rows), pairs_only=True)
    assert isinstance(good, TrainRow) and not good.negatives
    assert isinstance(bad, BadRow) and "positive is list, not a text" in bad.reason


def test_columns_that_are_named_are_no_columns_of_negatives(tmp_path: Path) -> None:
    rows = [{"q": "a", "negative": "b", "negative_1": "c"}]
    (row,) = read(write_lines(tmp_path / "pairs.jsonl", rows), columns=("q", "negative"))
    assert isinstance(row, TrainRow)
    assert (row.positive, row.negatives) == (Item("b"), (Item("c"),))
