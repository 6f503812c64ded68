"""Reading MMEB: V1 and V2 give the same texts, markers follow the images, bad rows are named, layouts are found."""

from pathlib import Path
from typing import Any

import datasets as hub_datasets
import pytest
from mmeb_files import M, eval_row, write_table

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.mmeb import MMEB, DatasetInfo
from gen2embed_mteb.mmeb.readers import BadRow, EvalRow, TrainRow, eval_columns, read_eval_rows, read_train_rows
from gen2embed_mteb.mmeb.row_text import drop_unmatched_markers
from gen2embed_mteb.mmeb.tables import DataError, open_subset, open_subsets


def info(name: str) -> DatasetInfo:
    return next(dataset for dataset in MMEB.datasets if dataset.name == name)


def read_one(tmp_path: Path, name: str, row: dict[str, Any]) -> EvalRow | BadRow:
    path = write_table(tmp_path / name / "test-00000-of-00001.parquet", [row])
    rows = list(read_eval_rows(open_subset(tmp_path, info(name), "test"), info(name)))
    path.unlink()
    assert len(rows) == 1
    return rows[0]


# One row a form as it stands in MMEB-eval (V1, instruction and text in one column) and in MMEB_Test_Instruct (V2).
SAME_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ImageNet-1K": (
        eval_row(f"{M}\nRepresent the given image for classification\n", "a.jpg", [("tench", ""), ("goldfish", "")]),
        {"qry_inst": f"{M}\nRepresent the given image for classification", "qry_text": "", "tgt_inst": None},
    ),
    "N24News": (
        eval_row(f"{M}\nRepresent the given news image with the following caption: Mr. X .\n", "a.jpg", [("Art", "")]),
        {
            "qry_inst": f"{M}\nRepresent the given news image with the following caption:",
            "qry_text": "Mr. X .",
            "tgt_inst": "",
        },
    ),
    "OK-VQA": (
        eval_row(f"{M}\nRepresent the given image with the following question: What?\n", "a.jpg", [("cat", "")]),
        {
            "qry_inst": f"{M} Represent the given image with the following question: ",
            "qry_text": "What?",
            "tgt_inst": None,
        },
    ),
    "MSCOCO_t2i": (
        eval_row("Find me an image of: a dog.\n", "", [(f"{M}\nRepresent the given image.\n", "b.jpg")]),
        {
            "qry_inst": "Find me an image of:",
            "qry_text": "a dog.",
            "tgt_inst": f"{M}\nRepresent the given image.",
            "tgt_text": [""],
        },
    ),
    "VisDial": (
        eval_row("Represent the dialogue: Q:is it?\nA:no\n\n", "", [(f"{M}\nRepresent the given image\n", "b.jpg")]),
        {
            "qry_inst": "Represent the dialogue:",
            "qry_text": "Q:is it?\nA:no",
            "tgt_inst": f"{M}\nRepresent the given image",
            "tgt_text": [""],
        },
    ),
    "WebQA": (
        eval_row(
            f"{M}\nFind a Wikipedia image that answers this question: Who?\n",
            "",
            [(f"{M}\nRepresent the given image with text: Ada.\n", "b.jpg")],
        ),
        {
            "qry_inst": f"{M}\nFind a Wikipedia image that answers this question:",
            "qry_text": "Who?",
            "tgt_inst": f"{M}\nRepresent the given image with text:",
            "tgt_text": ["Ada."],
        },
    ),
    "CIRR": (
        eval_row(
            f"{M}\nFind a similar image with the changes: redder\n", "a.jpg", [(f"{M}\nRepresent the image.", "b.jpg")]
        ),
        {
            "qry_inst": f"{M}\nFind a similar image with the changes: ",
            "qry_text": "redder",
            "tgt_inst": f"{M}\nRepresent the image.",
            "tgt_text": [""],
        },
    ),
    "RefCOCO-Matching": (
        eval_row(
            f'{M}\nSelect the portion that follows: "left man"\n',
            "a.jpg",
            [(f'{M}\nSelect the portion that follows: "right man"\n', "a.jpg")],
        ),
        {
            "qry_inst": f"{M}\nSelect the portion that follows:",
            "qry_text": '"left man"',
            "tgt_inst": f"{M}\nSelect the portion that follows:",
            "tgt_text": ['"right man"'],
        },
    ),
}


@pytest.mark.parametrize("name", SAME_ROWS)
def test_v2_composes_to_v1(tmp_path: Path, name: str) -> None:
    v1, changed = SAME_ROWS[name]
    assert read_one(tmp_path, name, v1) == read_one(tmp_path, name, {**v1, **changed})


def test_texts_character_by_character(tmp_path: Path) -> None:
    row = read_one(tmp_path, "N24News", {**SAME_ROWS["N24News"][0], **SAME_ROWS["N24News"][1]})
    assert isinstance(row, EvalRow)
    # The trailing newline stays; so does the marker, as the row has an image.
    caption = "<|image_1|>\nRepresent the given news image with the following caption: Mr. X .\n"
    assert row.query == Item(caption, ("a.jpg",))
    assert row.candidates == (Item("Art", ()),)
    # WebQA: the marker of a query without an image goes, with its newline; its candidates keep theirs.
    row = read_one(tmp_path, "WebQA", SAME_ROWS["WebQA"][0])
    assert isinstance(row, EvalRow)
    assert row.query == Item("Find a Wikipedia image that answers this question: Who?\n", ())
    assert row.candidates == (Item("<|image_1|>\nRepresent the given image with text: Ada.\n", ("b.jpg",)),)
    row = read_one(tmp_path, "VisDial", {**SAME_ROWS["VisDial"][0], **SAME_ROWS["VisDial"][1]})
    assert isinstance(row, EvalRow)
    assert row.query == Item("Represent the dialogue: Q:is it?\nA:no\n\n", ())
    # CIRR, V2: image candidates without a text end without a newline.
    row = read_one(tmp_path, "CIRR", {**SAME_ROWS["CIRR"][0], **SAME_ROWS["CIRR"][1]})
    assert isinstance(row, EvalRow)
    assert row.candidates == (Item("<|image_1|>\nRepresent the image.", ("b.jpg",)),)


@pytest.mark.parametrize(
    ("text", "num_images", "expected"),
    [
        (f"{M}\nFind it\n", 0, "Find it\n"),
        (f"{M} Find it\n", 0, "Find it\n"),
        (f"{M}Find it\n", 0, "Find it\n"),
        (f"{M} \nFind it\n", 0, "Find it\n"),
        (f"{M}\n\nFind it", 0, "\nFind it"),  # one newline belongs to the marker, not two
        (f"Use {M} for it", 0, "Use for it"),
        (f"{M}\nFind it\n", 1, f"{M}\nFind it\n"),
        (f"{M} and <|image_2|> here", 1, f"{M} and here"),
        (f"{M} and <|image_2|> here", 2, f"{M} and <|image_2|> here"),
        ("no marker\n", 0, "no marker\n"),
    ],
)
def test_markers_follow_the_images(text: str, num_images: int, expected: str) -> None:
    assert drop_unmatched_markers(text, num_images) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tgt_text": [], "tgt_img_path": []}, "the candidate list is empty"),
        ({"tgt_text": ["a", "b"]}, "2 candidate texts but 1 candidate image paths"),
        ({"tgt_text": None}, "tgt_text is null, not a list"),
        ({"tgt_text": [None]}, "tgt_text[0] is null, not a string"),
        ({"tgt_img_path": [None]}, "tgt_img_path[0] is null"),
        ({"qry_text": None}, "text of qry is null"),
        ({"qry_img_path": None}, "image path of qry is null"),
    ],
)
def test_bad_rows_are_set_aside_with_their_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    good = eval_row("q\n", "", [("a", "")])
    path = write_table(tmp_path / "VizWiz" / "test-0.parquet", [good, {**good, **change}, good])
    rows = list(read_eval_rows(open_subset(tmp_path, info("VizWiz"), "test"), info("VizWiz")))
    assert [type(row) for row in rows] == [EvalRow, BadRow, EvalRow]
    bad = rows[1]
    assert isinstance(bad, BadRow)
    assert (bad.index, bad.file) == (1, str(path))
    assert reason in bad.reason


def test_missing_columns_name_all_there_is_to_know(tmp_path: Path) -> None:
    row = eval_row("q", "", [("a", "")])
    del row["tgt_img_path"]
    path = write_table(tmp_path / "GQA" / "test-0.parquet", [row])
    with pytest.raises(DataError) as caught:
        list(read_eval_rows(open_subset(tmp_path, info("GQA"), "test"), info("GQA")))
    for part in (str(path), "no column tgt_img_path", "it has qry_text, qry_img_path, tgt_text", "rename"):
        assert part in str(caught.value)


def test_v2_needs_only_what_its_form_uses() -> None:
    columns = ("qry_inst", "qry_text", "tgt_text")
    assert eval_columns(info("GQA"), columns) == ("qry_inst", "qry_text", "qry_img_path", "tgt_text")
    assert "qry_img_path" not in eval_columns(info("EDIS"), columns)
    assert "tgt_inst" in eval_columns(info("OVEN"), columns)


@pytest.mark.parametrize(
    "layout",
    [
        "ImageNet-1K/test-00000-of-00001.parquet",
        "ImageNet_1K/test-00000-of-00001.parquet",
        "ImageNet-1K/test.parquet",
        "ImageNet-1K/test/0000.parquet",
        "data/ImageNet-1K/test-00000-of-00001.parquet",
        "data/ImageNet_1K/test.parquet",
    ],
)
def test_layouts(tmp_path: Path, layout: str) -> None:
    write_table(tmp_path / layout, [eval_row("q", "", [("a", "")])])
    table = open_subset(tmp_path, info("ImageNet-1K"), "test")
    assert (table.source, table.num_rows) == (str(tmp_path / layout), 1)


def test_several_files_in_order_and_limit(tmp_path: Path) -> None:
    for shard in range(3):
        rows = [eval_row(f"{shard}-{n}", "", [("a", "")]) for n in range(100)]
        write_table(tmp_path / "GQA" / f"test-{shard:05}-of-00003.parquet", rows)
    table = open_subset(tmp_path, info("GQA"), "test")
    texts = [row.query.text for row in read_eval_rows(table, info("GQA")) if isinstance(row, EvalRow)]
    assert texts == [f"{shard}-{n}" for shard in range(3) for n in range(100)]
    assert table.num_rows == 300
    assert [row.index for row in read_eval_rows(table, info("GQA"), 130)] == list(range(130))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    write_table(tmp_path / "GQA" / "test-0.parquet", [eval_row("q", "", [("a", "")])])
    with pytest.raises(DataError, match="no parquet file of VizWiz, split 'test'"):
        open_subset(tmp_path, info("VizWiz"), "test")
    with pytest.raises(DataError, match="split 'train'"):
        open_subset(tmp_path, info("GQA"), "train")
    with pytest.raises(DataError, match="no such folder"):
        open_subset("/no/such/folder", info("GQA"), "test")
    with pytest.raises(DataError, match=r"missing as well: TextVQA; usable: --subsets GQA"):
        open_subsets(tmp_path, [info("VizWiz"), info("GQA"), info("TextVQA")], "test")
    (tmp_path / "VizWiz").mkdir()
    (tmp_path / "VizWiz" / "test-0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable parquet file"):
        open_subset(tmp_path, info("VizWiz"), "test")


def test_damage_inside_a_file(tmp_path: Path) -> None:
    path = write_table(tmp_path / "GQA" / "test-0.parquet", [eval_row("q" * 50, "", [("a" * 50, "")])] * 50)
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(bytes(data))
    table = open_subset(tmp_path, info("GQA"), "test")
    with pytest.raises(DataError, match="damaged parquet file"):
        list(read_eval_rows(table, info("GQA")))


def test_a_hub_id_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "ImageNet_1K" / "test-0.parquet", [eval_row(f"{M}\nq\n", "a.jpg", [("a", "")])])
    real = hub_datasets.load_dataset

    asked = set()

    def load(hub_id: str, name: str, split: str, revision: str | None) -> Any:  # the Hub, from a folder of its layout
        assert hub_id == "TIGER-Lab/MMEB-eval"
        asked.add(revision)
        files = {split: [str(path) for path in (tmp_path / name).glob(f"{split}-*.parquet")]}
        if not files[split]:
            raise ValueError(f"BuilderConfig {name!r} not found")
        return real("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(hub_datasets, "load_dataset", load)
    table = open_subset("TIGER-Lab/MMEB-eval", info("ImageNet-1K"), "test", "a-commit")
    assert asked == {"a-commit"}
    assert table.source == "TIGER-Lab/MMEB-eval/ImageNet_1K"
    rows = list(read_eval_rows(table, info("ImageNet-1K")))
    assert rows == [EvalRow(0, Item(f"{M}\nq\n", ("a.jpg",)), (Item("a", ()),))]
    with pytest.raises(DataError, match="no subset GQA with split 'test'"):
        open_subset("TIGER-Lab/MMEB-eval", info("GQA"), "test")


def train_row(**changes: str | None) -> dict[str, Any]:
    row = {
        "qry": f"{M}\nName it\n",
        "qry_image_path": "images/a.jpg",
        "pos_text": "cat",
        "pos_image_path": "",
        "neg_text": "",
        "neg_image_path": "",
    }
    return {**row, **changes}


def test_train_rows(tmp_path: Path) -> None:
    rows = [
        train_row(),
        train_row(neg_text=f"{M}\nRepresent it\n", neg_image_path="images/n.jpg"),
        train_row(neg_text=None, neg_image_path=None),
        train_row(qry=f"{M}\nFind it\n", qry_image_path=""),
        train_row(pos_text="", pos_image_path=""),
        train_row(qry=None),
    ]
    folder = tmp_path / "ImageNet_1K"
    write_table(folder / "original-00000-of-00001.parquet", rows)
    write_table(folder / "diverse_instruction-00000-of-00001.parquet", [train_row(qry=f"Represent {M} now")])
    write_table(folder / "train-00000-of-00001.parquet", [train_row(qry="old")] * 9)  # left over in MMEB-train
    read = list(read_train_rows(open_subset(tmp_path, info("ImageNet-1K"), "original")))
    query, positive = Item(f"{M}\nName it\n", ("images/a.jpg",)), Item("cat", ())
    assert read[0] == TrainRow(0, query, positive, None)
    assert read[1] == TrainRow(1, query, positive, Item(f"{M}\nRepresent it\n", ("images/n.jpg",)))
    assert read[2] == TrainRow(2, query, positive, None)
    assert read[3] == TrainRow(3, Item("Find it\n", ()), positive, None)
    assert [row.reason for row in read[4:] if isinstance(row, BadRow)] == [
        "the positive has neither text nor image",
        "text of qry is null, not a string",
    ]
    diverse = list(read_train_rows(open_subset(tmp_path, info("ImageNet-1K"), "diverse_instruction")))
    assert [row.query.text for row in diverse if isinstance(row, TrainRow)] == [f"Represent {M} now"]


def test_train_rows_without_negatives(tmp_path: Path) -> None:
    row = {key: value for key, value in train_row().items() if not key.startswith("neg")}
    write_table(tmp_path / "GQA" / "original-0.parquet", [row])
    (read,) = read_train_rows(open_subset(tmp_path, info("GQA"), "original"))
    assert isinstance(read, TrainRow)
    assert read.negative is None
    del row["pos_text"]
    write_table(tmp_path / "GQA" / "original-0.parquet", [row])
    with pytest.raises(DataError, match="no column pos_text"):
        list(read_train_rows(open_subset(tmp_path, info("GQA"), "original")))
