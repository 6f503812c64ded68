"""A table's files are exactly the shards 0 … N-1 of one N, each once, of the split that was asked for."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mmeb_files import eval_row, write_table

from gen2embed_mteb import cli
from gen2embed_mteb.data_files.shards import DataError, by_table, canonical_split, split_of, whole_table
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.readers import EvalRow, read_eval_rows
from gen2embed_mteb.mmeb.tables import open_subset
from trainers.data.config import DataConfig
from trainers.data.training_data import open_training_data

IMAGENET = MMEB.datasets[0]


def write(root: Path, *names: str) -> None:
    """One row a file, which says where it stands."""
    for name in names:
        write_table(root / name, [eval_row(name, "", [("a", "")])])


def read(root: Path, split: str = "test") -> list[str]:
    rows = read_eval_rows(open_subset(root, IMAGENET, split), IMAGENET)
    return [row.query.text for row in rows if isinstance(row, EvalRow)]


S, D = "ImageNet-1K", "ImageNet_1K"  # its name in the evaluation and in the training data
WHOLE = {
    "one of one": [f"{S}/test-00000-of-00001.parquet"],
    "three of three": [f"{S}/test-0000{n}-of-00003.parquet" for n in range(3)],
    "of older versions of datasets": [f"{S}/test-0000{n}-of-00002-{n}b74b3ef9c3b5{n}00.parquet" for n in range(2)],
    "eleven, by number and not by name": [f"{S}/test-{n}-of-11.parquet" for n in range(11)],
    "the hub's converted branch": [f"{S}/test/0000.parquet", f"{S}/test/0001.parquet"],
    "of Spark": [f"{S}/test/part-0000{n}-8a9f.c000.parquet" for n in range(3)],
    "below data": [f"data/{S}/test-0000{n}-of-00002.parquet" for n in range(2)],
    "numbered by hand": [f"{S}/test-0.parquet", f"{S}/test-1.parquet"],
}
NOT_OF_IT = [
    f"{S}/train-00000-of-00002.parquet",
    f"{S}/test-hard-00000-of-00001.parquet",
    f"{S}/test-hard.parquet",
    f"{S}/testing.parquet",
    f"{S}/._test-00000-of-00001.parquet",
    f"{S}/test/._0000.parquet",
    f"{D}/original-00000-of-00004.parquet",
]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_table_is_read_in_order(tmp_path: Path, kind: str) -> None:
    write(tmp_path, *WHOLE[kind], *(name for name in NOT_OF_IT if not name.startswith(f"{S}/test/") or "hub" in kind))
    assert read(tmp_path) == WHOLE[kind]


NOT_WHOLE = {
    "one of three": ([f"{S}/test-00000-of-00003.parquet"], "shard 1, 2 of 0 to 2 is missing"),
    "the last is missing": ([f"{S}/test-0000{n}-of-00003.parquet" for n in (0, 1)], "shard 2 of 0 to 2"),
    "the first is missing": ([f"{S}/test-0000{n}-of-00003.parquet" for n in (1, 2)], "shard 0 of 0 to 2"),
    "two shardings": (
        [f"{S}/test-00000-of-00001.parquet", f"{S}/test-00000-of-00002.parquet", f"{S}/test-00001-of-00002.parquet"],
        "different ways of cutting",
    ),
    "a whole file beside shards": ([f"{S}/test.parquet", f"{S}/test-00000-of-00001.parquet"], "side by side"),
    "a browser's copy": (
        [f"{S}/test-00000-of-00001.parquet", f"{S}/test-00000-of-00001 (1).parquet"],
        "test-00000-of-00001 (1).parquet",
    ),
    "a desktop's copy": ([f"{S}/test.parquet", f"{S}/test - Copy.parquet"], "test - Copy.parquet"),
    "the same number twice": ([f"{S}/test-0-of-1.parquet", f"{S}/test-00000-of-00001.parquet"], "same shard"),
    "two hashes of one shard": (
        [f"{S}/test-00000-of-00001-{digit * 16}.parquet" for digit in "ab"],
        "same shard",
    ),
    "a shard beyond the last": ([f"{S}/test-0000{n}-of-00002.parquet" for n in (0, 1, 2)], "more than 2 shards"),
    "a folder and a file": ([f"{S}/test.parquet", f"{S}/test/0000.parquet"], "side by side"),
    "both spellings": ([f"{S}/test.parquet", f"{D}/test.parquet"], "side by side"),
    "below data, too": (
        [f"{S}/test-00000-of-00001.parquet", f"data/{S}/test-00000-of-00001.parquet"],
        "side by side",
    ),
    "shards in two folders": (
        [f"{S}/test-00000-of-00002.parquet", f"data/{S}/test-00001-of-00002.parquet"],
        "side by side",
    ),
    "a gap in numbers": ([f"{S}/test/0000.parquet", f"{S}/test/0002.parquet"], "shard 1 of 0 to 1 is missing"),
    "not from 0": ([f"{S}/test/0001.parquet"], "shard 0"),
    "not from 0, by hand": ([f"{S}/test-1.parquet"], "shard 0"),
    "two names": ([f"{S}/test/a.parquet", f"{S}/test/b.parquet"], "side by side"),
    "two programs": ([f"{S}/test/0000.parquet", f"{S}/test/part-0001.parquet"], "side by side"),
    "a huge N": ([f"{S}/test-00000-of-99999999999.parquet"], "shard 1, 2"),
    "a copy of one shard alone": ([f"{S}/test-00000-of-00003 (1).parquet"], "shard 1, 2 of 0 to 2 is missing"),
    "0 of 0": ([f"{S}/test-00000-of-00000.parquet"], "more than 0 shards"),
}


@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_a_table_that_is_not_whole_is_an_error_that_names_the_files(tmp_path: Path, kind: str) -> None:
    names, said = NOT_WHOLE[kind]
    write(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert said in str(caught.value)
    assert Path(names[0]).name in str(caught.value)


def pairs(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"anchor": list(texts), "positive": [f"{text}!" for text in texts]}), path)


def queries(root: Path, split: str = "", subsets: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """The queries that are read, by subset; the split of the data stands under an empty name."""
    data = open_training_data(DataConfig(data_dir=str(root), split=split, subsets=subsets), root / "cache")
    read = {subset.name: [row.query.text for row in subset.rows()] for subset in data.subsets}  # type: ignore[union-attr]
    return read | {"": [data.split]}


def test_pairs_in_shards(tmp_path: Path) -> None:
    for number in range(12):
        pairs(tmp_path / f"cats-{number:05}-of-00012.parquet", str(number))
    pairs(tmp_path / "dogs.parquet", "d")
    assert queries(tmp_path) == {"cats": [str(number) for number in range(12)], "dogs": ["d"], "": ["train"]}
    (tmp_path / "cats-00003-of-00012.parquet").unlink()
    with pytest.raises(DataError, match="shard 3 of 0 to 11 is missing"):
        queries(tmp_path)
    assert queries(tmp_path, subsets=("dogs",)) == {"dogs": ["d"], "": ["train"]}  # it is whole
    for copy in ("dogs (1).parquet", "dogs - Copy.parquet", "dogs-00000-of-00001.parquet", "dogs.jsonl"):
        pairs(tmp_path / copy, "d")
        with pytest.raises(DataError, match="dogs"):
            queries(tmp_path, subsets=("dogs",))
        (tmp_path / copy).unlink()


def test_one_shard_by_its_own_name_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs(tmp_path / "cats-00001-of-00003.parquet", "a")
    assert queries(tmp_path / "cats-00001-of-00003.parquet")["cats"] == ["a"]
    assert "one shard of several" in caplog.text


SPLITS = {
    "shards of the hub": ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
    "files": ["train.parquet", "validation.parquet", "test.parquet"],
    "dev": ["train.parquet", "dev.parquet"],
    "behind the name": ["cats_train.parquet", "cats_test.parquet"],
    "in the name": ["cats.train.v2.parquet", "cats.eval.v2.parquet"],
    "below data": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "in capitals": ["Train.parquet", "TEST.parquet"],
}


@pytest.mark.parametrize("split", ["", "train"])
@pytest.mark.parametrize("kind", SPLITS)
def test_test_data_never_comes_into_training(tmp_path: Path, kind: str, split: str) -> None:
    for name in SPLITS[kind]:
        pairs(tmp_path / name, name)
    read = queries(tmp_path, split)
    assert read.pop("") == ["train"]
    assert list(read.values()) == [[SPLITS[kind][0]]]


def test_any_split_can_be_asked_for(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        pairs(tmp_path / f"{name}.parquet", name)
    assert queries(tmp_path, "test") == {"test": ["test"], "": ["test"]}
    assert queries(tmp_path, "validation") == {"dev": ["dev"], "": ["validation"]}
    assert queries(tmp_path, "dev") == {"dev": ["dev"], "": ["dev"]}
    pairs(tmp_path / "validation.parquet", "validation")  # now they are two splits
    assert queries(tmp_path, "validation") == {"validation": ["validation"], "": ["validation"]}
    assert queries(tmp_path, "dev") == {"dev": ["dev"], "": ["dev"]}


def test_a_split_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path / "cats.parquet", "a")
    assert queries(tmp_path, "train")["cats"] == ["a"]  # what names no split is training data
    with pytest.raises(DataError, match="no split 'test', the names say none"):
        queries(tmp_path, "test")
    pairs(tmp_path / "test.parquet", "t")
    with pytest.raises(DataError, match=r"cats\.parquet: it is not clear of which split"):
        queries(tmp_path)
    (tmp_path / "cats.parquet").unlink()
    with pytest.raises(DataError, match="no file of split 'train', only of test"):
        queries(tmp_path)
    pairs(tmp_path / "train_test.parquet", "t")
    with pytest.raises(DataError, match="speaks of the splits test and train"):
        queries(tmp_path)


def test_a_file_by_its_own_name(tmp_path: Path) -> None:
    pairs(tmp_path / "test.parquet", "t")
    assert queries(tmp_path / "test.parquet") == {"test": ["t"], "": ["test"]}
    assert queries(tmp_path / "test.parquet", "test") == {"test": ["t"], "": ["test"]}
    with pytest.raises(DataError, match="its name says split 'test', not 'train'"):
        queries(tmp_path / "test.parquet", "train")


def test_saved_datasets_know_their_split(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"anchor": [name], "positive": ["p"]}, split=name)  # type: ignore[arg-type]
            for name in ("train", "test")
        }
    )
    both.save_to_disk(tmp_path / "both")
    assert queries(tmp_path / "both") == {"train": ["train"], "": ["train"]}
    assert queries(tmp_path / "both", "test") == {"test": ["test"], "": ["test"]}
    with pytest.raises(DataError, match="no such split"):
        queries(tmp_path / "both", "validation")
    both["test"].save_to_disk(tmp_path / "one")
    assert queries(tmp_path / "one") == {"one": ["test"], "": ["test"]}
    with pytest.raises(DataError, match="holds split 'test', not 'train'"):
        queries(tmp_path / "one", "train")


def test_jsonl_has_splits_too(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"anchor": "{name}", "positive": "p"}}\n')
    assert queries(tmp_path) == {"train": ["train"], "": ["train"]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train-00000-of-00002", "train"), ("dev", "validation"), ("cats_val", "validation"), ("contest", None),
        ("latest", None), ("trainers", None), ("2024-test-3", "test"), ("evaluation pairs", "test"), ("cats", None),
    ],
)  # fmt: skip
def test_what_names_say(name: str, expected: str | None) -> None:
    assert split_of(Path(f"{name}.parquet")) == expected


def test_words_for_splits() -> None:
    assert [canonical_split(word) for word in ("dev", "Train", "original")] == ["validation", "train", "original"]
    files = [Path("a.parquet"), Path("a (2).parquet"), Path("b (1).parquet"), Path("(1).parquet")]
    assert {name: len(group) for name, group in by_table(files).items()} == {"a": 2, "b (1)": 1, "(1)": 1}


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "loop", "nothing"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    """None of these is opened: a named pipe would block for ever, `/dev/zero` never ends."""
    import socket

    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                os.chdir(path.parent)
                made.bind(path.name)
        else:
            path.symlink_to({"device": "/dev/zero", "loop": path, "nothing": tmp_path / "nothing"}[kind])
        return path

    with pytest.raises(DataError):
        whole_table([put(tmp_path / "a.parquet")])
    put(tmp_path / "eval" / "GQA" / "test-00000-of-00001.parquet")
    put(tmp_path / "lines" / "pairs.jsonl")
    put(tmp_path / "pairs" / "pairs.parquet")
    put(tmp_path / "mmeb" / "VOC2007" / "original.parquet")
    put(tmp_path / "crepe" / "add_obj.json")
    output = ["--output_dir", str(tmp_path / "out")]
    model = ["evaluate", "--model_name", "gen2embed-mini", *output, "--image_dir", str(tmp_path)]
    assert cli.main([*model, "--data_dir", str(tmp_path / "eval"), "--subsets", "GQA"]) == 2
    crepe = ["--benchmark", "sugarcrepe", "--subsets", "add_obj"]
    assert cli.main([*model, *crepe, "--data_dir", str(tmp_path / "crepe")]) == 2
    for name in ("lines", "pairs", "mmeb", "lines/pairs.jsonl", "pairs/pairs.parquet"):
        subset = ["--subsets", "VOC2007"] if name == "mmeb" else []
        assert cli.main(["sample", "--method", "in-batch", "--data_dir", str(tmp_path / name), *output, *subset]) == 2
