"""The input: what it is taken for, which columns are read, and that its parts hold every row once and in order."""

import io
import pickle
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from encode_jobs import write_lines
from PIL import Image

from gen2embed_mteb.data_files.rows import BadRow, RowLimits
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.encode_command.opening import open_source
from gen2embed_mteb.encode_command.options import InputOptions
from gen2embed_mteb.encode_command.rows import Columns, Row, find_columns
from gen2embed_mteb.encode_command.sources import Source


def opened(path: Path, **options: Any) -> Source:
    return open_source(InputOptions(input=str(path), **options))


def rows_of(source: Source, size: int = 7) -> list[Row | BadRow]:
    """All rows, read part by part, in an order of no meaning, from a copy that went through pickle."""
    parts = list(source.parts(size))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [part.first_row for part in parts] == [size * number for number in range(len(parts))]
    assert sum(part.num_rows for part in parts) == source.num_rows
    other = pickle.loads(pickle.dumps(source))
    found: dict[int, list[Row | BadRow]] = {}
    for part in random.Random(0).sample(parts, len(parts)):
        found[part.number] = list(other.rows(pickle.loads(pickle.dumps(part)), RowLimits()))
        assert len(found[part.number]) == part.num_rows
    rows = [row for number in sorted(found) for row in found[number]]
    assert [row.index for row in rows] == list(range(len(rows)))
    return rows


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [1, 3, 7, 20, 100])
def test_json_lines_in_parts_are_the_lines(tmp_path: Path, size: int) -> None:
    lines: list[Any] = [{"id": n, "text": "x" * (n % 5 + 1)} for n in range(40)]
    lines[3] = "{broken"
    lines[4:4] = ["", "   "]  # empty lines are no rows
    lines[20] = '["a list"]'
    write_lines(tmp_path / "a" / "one.jsonl", lines)
    with (tmp_path / "a" / "one.jsonl").open("a") as file:
        file.write('{"id": 40, "text": "no line break at the end"}')
    write_lines(tmp_path / "a" / "two.jsonl", [{"id": "b", "text": "ü"}])
    source = opened(tmp_path / "a")
    rows = rows_of(source, size)
    assert len(rows) == source.num_rows == 42
    assert [row.index for row in rows if isinstance(row, BadRow)] == [3, 18]
    assert "line 4: no JSON" in rows[3].reason
    assert "line 21: not an object" in rows[18].reason
    assert rows[40:] == [Row(40, "40", "no line break at the end", ()), Row(41, "b", "ü", ())]
    assert rows_of(opened(tmp_path / "a", limit=41), size)[-1] == rows[40]
    assert opened(tmp_path / "a", limit=11).num_rows == 11


@pytest.mark.parametrize("group", [1, 64, 1000])
def test_parquet_in_parts_are_the_rows(tmp_path: Path, group: int) -> None:
    for number, count in enumerate((90, 1, 130)):
        table = pyarrow.table({"text": [f"{number} {n}" for n in range(count)], "other": list(range(count))})
        pyarrow.parquet.write_table(table, tmp_path / f"t-{number:05}-of-00003.parquet", row_group_size=group)
    want = [f"{number} {n}" for number, count in enumerate((90, 1, 130)) for n in range(count)]
    for size in (32, 89, 91, 500):
        assert [row.text for row in rows_of(opened(tmp_path), size)] == want
    assert [row.text for row in rows_of(opened(tmp_path, limit=95))] == want[:95]
    assert rows_of(opened(tmp_path))[100].id == "100"
    (tmp_path / "t-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="shard 1 of 0 to 2 is missing"):
        opened(tmp_path)


def test_pictures_by_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["b/ü.PNG", "b.png", "a b/c.jpeg", "b/a/x.webp", "b-1.png", "B.png", "z.bmp"]
    ignored = [".hidden/x.png", "b/.x.png", "note.txt", "png"]
    for name in names + ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = opened(tmp_path)
    assert source.kind == "pictures"
    assert [row.id for row in rows_of(source, 3)] == sorted(names)
    assert rows_of(source)[0] == Row(0, "B.png", "", ("B.png",))
    assert opened(tmp_path, limit=2).num_rows == 2


def test_a_name_that_is_no_text_is_set_aside(tmp_path: Path) -> None:
    try:
        (tmp_path / "a\udcff.png").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "b.png").write_bytes(b"")
    bad, good = rows_of(opened(tmp_path))
    assert isinstance(bad, BadRow)
    assert "no Unicode text" in bad.reason
    assert good.id == "b.png"
    bad.file.encode()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_datasets(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(png())
    features = datasets.Features(
        {"caption": datasets.Value("string"), "image": datasets.Image(), "n": datasets.Value("int32")}
    )
    images = [{"bytes": png(), "path": None}, {"bytes": None, "path": "x.png"}, None] * 4
    made = datasets.Dataset.from_dict({"caption": ["a"] * 11 + [None], "image": images, "n": range(12)}, features)
    if streaming:
        made.to_parquet(tmp_path / "p" / "train.parquet")
        source = opened(tmp_path / "p", streaming=True)
    else:
        datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "d")
        source = opened(tmp_path / "d")
        with pytest.raises(DataError, match="no split 'test'; it has train"):
            opened(tmp_path / "d", split="test")
    assert source.columns == Columns("caption", "image", "")
    rows = rows_of(source, 5)
    assert rows[0].images == (png(),)
    assert rows[1].images == (("x.png",) if streaming else (png(),))  # `save_to_disk` embeds what has a path
    assert rows[2].images == ()
    assert isinstance(rows[11], BadRow)
    assert rows[11].reason == "caption and image is empty"
    assert opened(tmp_path / ("p" if streaming else "d"), streaming=streaming, limit=4).num_rows == 4


def test_columns_are_found_by_their_usual_names() -> None:
    assert find_columns(["n", "Title", "Text", "IMG", "_id"], Columns(), "t") == Columns("Text", "IMG", "_id")
    assert find_columns(["a", "b"], Columns("b", "a", "none"), "t") == Columns("b", "a", "")
    assert find_columns(["text", "image"], Columns("none"), "t") == Columns("", "image", "")
    for asked, said in (
        (Columns(), "it has a, b. Name it with --text_column or --image_column"),
        (Columns("c"), "no column 'c'; it has a, b. Correct --text_column"),
        (Columns("a", "a"), "column 'a' is named for texts and for images"),
        (Columns("none", "none"), "no column of texts or images"),
    ):
        with pytest.raises(DataError, match=said):
            find_columns(["a", "b"], asked, "t")


CELLS = [
    ({"text": 3}, "text is int, not a string"),
    ({"text": "\ud800"}, "lone surrogate"),
    ({"text": "", "image": None}, "text and image is empty"),
    ({"text": "x" * 1_000_001}, "more than max_text_chars"),
    ({"image": 3}, "image is int, not a path, bytes"),
    ({"image": {"path": None}}, "neither bytes nor path"),
    ({"image": {"url": "http://x"}}, "unknown key url"),
    ({"image": "x" * 5000}, "so it is no path"),
    ({"text": "a", "id": None}, "id is null"),
    ({"text": "a", "id": 1.5}, "id is float"),
    ({"text": "a", "id": True}, "id is bool"),
]


def test_bad_cells_are_set_aside_with_their_reason(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "t.jsonl", [{"id": "good", "text": "a", "image": ["x.png", "y.png"]}, *(c for c, _ in CELLS)]
    )
    rows = rows_of(opened(tmp_path / "t.jsonl"))
    assert rows[0] == Row(0, "good", "a", ("x.png", "y.png"))
    for row, (cells, said) in zip(rows[1:], CELLS, strict=True):
        assert isinstance(row, BadRow), cells
        assert said in row.reason or (said != "id is null" and "id is null" in row.reason), (cells, row.reason)


def test_what_cannot_be_an_input_says_why(tmp_path: Path) -> None:
    def refused(said: str, path: Path = tmp_path, **options: Any) -> None:
        with pytest.raises(DataError, match=said):
            opened(path, **options)

    refused("no such file or folder", tmp_path / "none")
    with pytest.raises(DataError, match="for a data set of the hub pass --streaming"):
        open_source(InputOptions(input="owner/name"))
    refused("no pictures .* and no tables")
    (tmp_path / "x.csv").write_text("a,b")
    refused("neither a folder nor a file that ends in .jsonl, .ndjson, .parquet", tmp_path / "x.csv")
    (tmp_path / "e.jsonl").write_text("")
    refused("no rows", tmp_path / "e.jsonl")
    write_lines(tmp_path / "b.jsonl", ["{broken"])
    refused("line 1: no JSON", tmp_path / "b.jsonl")
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    refused("not a readable parquet file", tmp_path / "p.parquet")
    refused("holds .jsonl and .parquet files; pass --kind")
    (tmp_path / "p.parquet").unlink()
    (tmp_path / "a.png").write_bytes(png())
    refused("holds pictures and tables; pass --kind pictures, or --kind jsonl")
    assert opened(tmp_path, kind="pictures").num_rows == 1
    refused("--text_column is for tables, and this is none", kind="pictures", text_column="a")
    refused("--split is for data sets, and this is none", tmp_path / "b.jsonl", split="test")
    refused("'test' cannot be read .*check the name, --subset", tmp_path, streaming=True, split="test")
    write_lines(tmp_path / "b.jsonl", [{"text": "a"}])
    refused("no such folder or archive; correct --image_dir", tmp_path / "b.jsonl", image_dir=str(tmp_path / "none"))
