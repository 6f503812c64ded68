"""Training pairs: one rule for cells, names as they are spelled, tables without rows, images that are kept."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.data_files.rows import BadRow, RowLimits
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.cached_images import CachedImages
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.datasets import lookup, matches
from gen2embed_mteb.mmeb.tables import DataError
from gen2embed_mteb.storage.atomic import ForeignFileError
from trainers.batches.collation import CellReader
from trainers.batches.dataset import OpenInputs
from trainers.batches.sampled import open_sampled_data, read_samplings
from trainers.data.cells import read_cell, stored_image
from trainers.data.config import DataConfig
from trainers.data.training_data import open_training_data
from trainers.sampling.files import SamplingError, read_sampling
from trainers.sampling.sample import ModelRecord, SampleConfig, sample


def png(colour: str, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(png(name))
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> list[Item | BadRow]:
    """The queries of the only subset."""
    data = open_training_data(DataConfig(data_dir=str(path), **options), path.parent / "cache")
    return [row if isinstance(row, BadRow) else row.query for row in data.subsets[0].rows()]


GOOD_CELLS: list[tuple[Any, tuple[str, list[str]]]] = [
    ("a text", ("a text", [])),
    ("red.png", ("red.png", [])),
    ({"text": "t"}, ("t", [])),
    ({"image": "red.png"}, ("", ["red.png"])),
    ({"text": "t", "image": "red.png"}, ("t", ["red.png"])),
    ({"text": "t", "images": "red.png"}, ("t", ["red.png"])),
    ({"text": "t", "images": ["red.png", "blue.png"]}, ("t", ["red.png", "blue.png"])),
    ({"text": "t", "image": ["red.png", None, ""]}, ("t", ["red.png"])),
    ({"text": "t", "image": None, "images": ["blue.png"]}, ("t", ["blue.png"])),
    ({"text": "t", "image": "", "image_path": None}, ("t", [])),  # tables fill up what a row lacks with null
    ({"path": "red.png"}, ("", ["red.png"])),
    ({"bytes": None, "path": "red.png"}, ("", ["red.png"])),
    ({"text": "t", "image": {"bytes": None, "path": "red.png"}}, ("t", ["red.png"])),
]
UNKNOWN_KEYS = ["image_path", "img", "imgs", "Image", "picture", "images_path", "label", "url", "bytes", "path", "role"]


@pytest.mark.parametrize(("cell", "expected"), GOOD_CELLS)
def test_sampling_and_training_take_the_same_cells(root: Path, cell: Any, expected: tuple[str, list[str]]) -> None:
    lines = write_lines(root / "pairs.jsonl", [{"anchor": cell, "positive": "p"}])
    assert read(lines) == [Item(expected[0], tuple(expected[1]))]
    model = Gen2Embed("gen2embed-mini", image_root=str(root))
    content = CellReader(model).content(cell)
    assert content.text == expected[0]
    colours = [image.getpixel((0, 0)) for image in content.images]
    assert colours == [{"red.png": (255, 0, 0), "blue.png": (0, 0, 255)}[name] for name in expected[1]]


@pytest.mark.parametrize("key", UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_by_name_everywhere(root: Path, key: str) -> None:
    cell = {"text": "t", key: "red.png"}
    good = {"anchor": "a", "positive": "p"}
    lines = write_lines(root / "pairs.jsonl", [good, {"anchor": cell, "positive": "p"}])
    _, bad = read(lines)
    assert isinstance(bad, BadRow)
    assert f"anchor: unknown key '{key}'" in bad.reason
    if key != "role":  # a conversation, which a trainer's own dataset may hold
        with pytest.raises(TypeError, match=f"'{key}'"):
            CellReader(Gen2Embed("gen2embed-mini", image_root=str(root))).content(cell)
    with pytest.raises(TypeError, match=f"'{key}'"):
        OpenInputs(CachedImages(root, root / "cache")).open(cell)
    write_lines(lines, [{"anchor": cell, "positive": "p"}] * 3)
    with pytest.raises(DataError, match=f"none of the first 3 rows can be used: anchor: unknown key '{key}'"):
        read(lines)


def test_a_column_of_wrong_keys_is_an_error_in_parquet_and_saved_datasets(root: Path) -> None:
    rows = {"anchor": [{"text": "a", "image_path": "red.png"}] * 3, "positive": ["p"] * 3}
    pq.write_table(pa.table(rows), root / "pairs.parquet")
    datasets.Dataset.from_dict(rows).save_to_disk(root / "saved")
    for path in (root / "pairs.parquet", root / "saved"):
        with pytest.raises(DataError, match="unknown key 'image_path'"):
            read(path)


def test_cells_that_are_taken_apart() -> None:
    assert read_cell({"text": "t", "images": ()}) == ("t", ())
    assert read_cell({}) == (None, ())
    with pytest.raises(TypeError, match='both "image" and "images"'):
        read_cell({"image": "a", "images": "b"})
    with pytest.raises(TypeError, match='"text" is int'):
        read_cell({"text": 3})
    assert stored_image({"bytes": bytearray(b"x"), "path": "p"}) == b"x"
    for image, said in (
        ({"bytes": "x"}, "str, not bytes"), ({"bytes": [1]}, "list, not bytes"), ({"path": b"x"}, "bytes, not a str"),
        ({"bytes": b"", "path": ""}, "neither"), ({}, "neither"), ({"path": "x", "mode": "RGB"}, "unknown key 'mode'"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=said):
            stored_image(image)


def test_embedded_images_are_kept_under_their_digest_and_never_trusted(root: Path) -> None:
    images = CachedImages(root, root / "cache")
    path, digest = images.keep(png("red")), hashlib.sha256(png("red")).hexdigest()
    file = root / "cache" / digest[:2] / digest
    assert (path, file.read_bytes()) == (f"embedded:{digest}", png("red"))
    assert images.open(path).getpixel((0, 0)) == (255, 0, 0)
    assert images.facts(path).size == (32, 32)
    file.write_bytes(png("blue"))  # another picture, whole
    assert images.open(path).getpixel((0, 0)) == (255, 0, 0)  # from what was read and compared before
    other = CachedImages(root, root / "cache")
    for use in (images.facts, other.open, other.facts):
        with pytest.raises(ImageError, match="damaged, its content is not what its name says"):
            use(path)
    with pytest.raises(ForeignFileError, match="damaged"):
        CachedImages(root, root / "cache").keep(png("red"))
    assert file.read_bytes() == png("blue")
    file.unlink()
    (root / "elsewhere").write_bytes(png("red"))
    file.symlink_to(root / "elsewhere")
    with pytest.raises(ForeignFileError):
        CachedImages(root, root / "cache").keep(png("red"))


def test_a_table_without_rows_is_an_error(root: Path) -> None:
    columns = {"anchor": pa.array([], pa.string()), "positive": pa.array([], pa.string())}
    pq.write_table(pa.table(columns), root / "none.parquet")
    (root / "none.jsonl").write_text("\n \n\t\n")
    empty = datasets.Dataset.from_dict({"anchor": [], "positive": []})
    empty.save_to_disk(root / "saved")
    (root / "VOC2007").mkdir()
    mmeb = dict.fromkeys(("qry", "qry_image_path", "pos_text", "pos_image_path"), columns["anchor"])
    pq.write_table(pa.table(mmeb), root / "VOC2007" / "original.parquet")
    for name, subsets in (("none.parquet", ()), ("none.jsonl", ()), ("saved", ()), ("", ("VOC2007",))):
        with pytest.raises(DataError, match="the table has no rows"):
            read(root / name, subsets=subsets)
    # An empty shard among others is none.
    for number, texts in enumerate((["a"], [], ["b"])):
        table = pa.table({"anchor": pa.array(texts, pa.string()), "positive": pa.array(texts, pa.string())})
        (root / "many").mkdir(exist_ok=True)
        pq.write_table(table, root / "many" / f"some-{number}-of-3.parquet")
    assert read(root / "many") == [Item("a"), Item("b")]


def test_two_columns_of_one_name_are_refused(root: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["p"])], ["anchor", "anchor", "positive"])
    pq.write_table(table, root / "pairs.parquet")
    with pytest.raises(DataError, match="two columns are called 'anchor'"):
        read(root / "pairs.parquet")


def test_columns_that_the_first_line_lacks(root: Path) -> None:
    lines = write_lines(root / "pairs.jsonl", [{"note": "x"}, {"positive": "p"}, {"anchor": "a", "positive": "p"}])
    assert [isinstance(row, BadRow) for row in read(lines)] == [True, True, False]
    lines.write_bytes(b"\xef\xbb\xbf" + b'{"anchor": "a", "positive": "p"}\r\n')  # a byte order mark, lines of Windows
    assert read(lines) == [Item("a")]


KNOWN = {"Cats": "Cats", "cats": "cats", "Dogs": "Dogs", "Caf\u00e9": "Caf\u00e9", "K-1": "K1", "k-1": "K1"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Cats", ["Cats"]), ("cats", ["cats"]), ("CATS", ["Cats", "cats"]), ("dogs", ["Dogs"]), (" Dogs ", ["Dogs"]),
        ("cafe\u0301", ["Caf\u00e9"]), ("K-1", ["K1"]), ("birds", []), ("", []),
    ],
)  # fmt: skip
def test_a_name_is_taken_as_it_is_spelled(name: str, meant: list[str]) -> None:
    assert matches(name, KNOWN) == meant
    if len(meant) == 1:
        assert lookup(name, KNOWN, "subset", KNOWN) == meant[0]
    else:
        with pytest.raises(Gen2EmbedError, match="can mean Cats or cats" if meant else "unknown subset"):
            lookup(name, KNOWN, "subset", KNOWN)


def test_names_that_differ_in_case_alone(root: Path) -> None:
    for name in ("Cats", "cats"):
        rows = [{"anchor": f"{name} {number}", "positive": f"p{number}"} for number in range(3)]
        write_lines(root / f"{name}.jsonl", rows)
        folder = root / "mmeb" / name
        folder.mkdir(parents=True)
        columns = {"qry": [name], "qry_image_path": [""], "pos_text": ["p"], "pos_image_path": [""]}
        pq.write_table(pa.table(columns), folder / "original.parquet")
    for folder, queries in ((root, ("Cats 0", "cats 0")), (root / "mmeb", ("Cats", "cats"))):
        for name, query in zip(("Cats", "cats"), queries, strict=True):
            assert read(folder, subsets=(name,))[0] == Item(query)
        with pytest.raises(Gen2EmbedError, match="subset 'CATS' can mean Cats or cats"):
            read(folder, subsets=("CATS",))
    config = SampleConfig(data_dir=str(root), output_dir=str(root / "out"), method="in-batch")
    assert sample(None, ModelRecord(), open_training_data(config, config.images_cache), config).made == ("Cats", "cats")
    out = str(root / "out")
    assert [one.record["subset"] for one in read_samplings(out)] == ["Cats", "cats"]
    assert [one.record["subset"] for one in read_samplings(out, ["cats"])] == ["cats"]
    with pytest.raises(SamplingError, match="'CATS' can mean Cats or cats"):
        read_samplings(out, ["CATS"])
    with pytest.raises(SamplingError, match="subset 'dogs' was not sampled, only Cats, cats"):
        read_samplings(out, ["dogs"])


def test_the_benchmarks_own_names_in_any_case() -> None:
    assert MMEB.select(["imagenet_1k", "GQA"]).names == ("ImageNet-1K", "GQA")


def test_limits_of_a_run_are_those_of_its_training(root: Path) -> None:
    """Rows beyond the limits of sampling are set aside in training as well, so that row numbers are the same."""
    rows = [{"anchor": "a" * length, "positive": f"p{length}"} for length in (5, 50, 5, 7)]
    write_lines(root / "pairs.jsonl", rows)
    config = SampleConfig(
        data_dir=str(root / "pairs.jsonl"), output_dir=str(root / "out"), method="in-batch", max_text_chars=20
    )
    sample(None, ModelRecord(), open_training_data(config, config.images_cache), config)
    sampling = read_sampling(root / "out" / "pairs.parquet")
    assert sampling.clusters.anchors.tolist() == [0, 2, 3]
    (subset,) = open_sampled_data([sampling]).subsets
    assert [row.index for row in subset.rows() if isinstance(row, BadRow)] == [1]
    # A record of a version without limits has none, and the defaults stand for them.
    del sampling.record["data"]["row_limits"]
    (subset,) = open_sampled_data([sampling]).subsets
    assert not any(isinstance(row, BadRow) for row in subset.rows())
    for name in RowLimits().row_limits():
        with pytest.raises(Gen2EmbedError, match=f"{name} is 0; pass 1 or more"):
            DataConfig(data_dir="d", **{name: 0})


def test_images_are_found_in_the_first_rows_and_none_is_written(root: Path) -> None:
    stored = {"bytes": png("red"), "path": None}
    texts = [{"text": f"a{number}", "image": None} for number in range(100)]
    for name, late in (("early", 99), ("late", 100)):
        rows = [{"anchor": one, "positive": "p"} for one in [*texts[:late], {"text": "x", "image": stored}]]
        kind = pa.struct({"text": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
        columns = {"anchor": pa.array([row["anchor"] for row in rows], kind), "positive": ["p"] * len(rows)}
        pq.write_table(pa.table(columns), root / f"{name}.parquet")
    config = DataConfig(data_dir=str(root))
    found = {one.name: one.has_images() for one in open_training_data(config, root / "cache").subsets}
    assert found == {"early": True, "late": False}
    assert not (root / "cache").exists()
