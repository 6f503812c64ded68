"""Tables in which every kind of bad row occurs once between good ones: each is counted, and two runs are the same."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mmeb_files import M, eval_row, write_images
from PIL import Image
from plain_encoder import PlainEncoder
from preloaded import Preloaded

from gen2embed_mteb import cli
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.sugarcrepe.evaluate import SUGARCREPE_BENCHMARK, evaluate_captions
from trainers.data.training_data import open_training_data
from trainers.sampling.files import read_sampling
from trainers.sampling.sample import ModelRecord, SampleConfig, sample

pytestmark = pytest.mark.slow

GOOD = eval_row("q\n", "", [("a", ""), ("b", "")])
LIMITS = ["--max_text_chars", "2000", "--max_candidates", "50", "--max_row_bytes", "100000"]
LONG, WIDE = "x" * 3000, 60


def run_twice(words: list[str], output: Path, preloaded: Preloaded) -> list[dict[str, Any]]:
    """Runs a command here and in a process of another hash seed; returns the lines of `errors.jsonl`, equal in both."""
    folders = [output / "here", output / "process"]
    here, process = ([*words, "--output_dir", str(folder)] for folder in folders)
    assert cli.main(here) == 1  # more than --max_error_rate
    assert preloaded.run(["-c", "print(hash('a'))"]).stdout != f"{hash('a')}\n"
    done = preloaded.run(["-m", "gen2embed_mteb.cli", *process])
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    written = [(folder / "errors.jsonl").read_bytes() for folder in folders]
    assert written[0] == written[1]
    return [json.loads(line) for line in written[0].splitlines()]


def strings(values: list[bytes | None]) -> pa.Array:
    """A string column of any bytes, UTF-8 or not."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers(), binary.null_count)


def lists(offsets: list[int], values: list[bytes]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), strings(values))


def between(rows: list[dict[str, Any]], good: dict[str, Any]) -> list[dict[str, Any]]:
    """good, bad, good, bad, …, good."""
    return [row for bad in rows for row in (good, bad)] + [good]


# What is wrong with a row, and a part of the reason.
STRING_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"tgt_text": [], "tgt_img_path": []}, "the candidate list is empty"),
    ({"tgt_text": ["a", "b", "c"]}, "3 candidate texts but 2 candidate image paths"),
    ({"tgt_text": None}, "tgt_text is null, not a list"),
    ({"tgt_img_path": ["", None]}, "tgt_img_path[1] is null, not a string"),
    ({"qry_text": None}, "text of qry is null, not a string"),
    ({"qry_img_path": None}, "image path of qry is null, not a string"),
    ({"qry_text": LONG}, "text of qry has 3000 characters, more than max_text_chars 2000"),
    ({"tgt_text": ["a", LONG]}, "tgt_text[1] has 3000 characters"),
    ({"tgt_text": ["a"] * WIDE, "tgt_img_path": [""] * WIDE}, "tgt_text has 60 entries, more than max_candidates 50"),
    ({"tgt_text": ["y" * 120_000, "b"]}, "the row has more than max_row_bytes 100000"),
    ({"qry_img_path": "img/none.png"}, "not found"),
    ({"qry_img_path": "img/no-image.png"}, "img/no-image.png"),
    ({"qry_img_path": "../outside.png"}, "outside"),
    ({"qry_img_path": "img/\0.png"}, "img/"),
    ({"qry_img_path": "data:image/png;base64," + "A" * 5000}, "image path of qry has 5022 characters"),
]


def write_eval_tables(root: Path) -> list[str]:
    """Six shards of GQA; returns the reasons in the order of the rows."""
    schema = pa.schema([("qry_text", pa.string()), ("qry_img_path", pa.string())]).append(
        pa.field("tgt_text", pa.list_(pa.string()))
    )
    schema = schema.append(pa.field("tgt_img_path", pa.list_(pa.string())))
    rows = between([{**GOOD, **change} for change, _ in STRING_ROWS], GOOD)
    good = pa.Table.from_pylist([GOOD], schema=schema)
    empty = {"qry_img_path": pa.array([""] * 3), "tgt_img_path": pa.array([[""]] * 3)}
    bad_bytes = pa.table(
        {
            "qry_text": strings([b"q", b"\xff\xfe", b"q"]),
            "tgt_text": lists([0, 1, 2, 3], [b"a", b"b", b"\xc3"]),
            **empty,
        }
    )
    one = pa.table(GOOD | {key: [value] for key, value in GOOD.items()})
    others: list[tuple[pa.Table, list[str]]] = [
        (pa.Table.from_pylist(rows, schema=schema), [reason for _, reason in STRING_ROWS]),
        (bad_bytes, ["qry_text cannot be read", "tgt_text cannot be read"]),
        (one.set_column(0, "qry_text", pa.array([5])), ["text of qry is int, not a string"]),
        (one.set_column(2, "tgt_text", pa.array([[["a"]]])), ["tgt_text[0] is list, not a string"]),
        (one.set_column(2, "tgt_text", pa.array(["a"])), ["tgt_text is str, not a list"]),
        (one.set_column(2, "tgt_text", pa.array([[b"a", b"b"]])), ["tgt_text[0] is bytes, not a string"]),
        (good, []),
    ]
    folder = root / "GQA"
    folder.mkdir(parents=True)
    for number, (table, _) in enumerate(others):
        pq.write_table(table, folder / f"test-{number:05}-of-{len(others):05}.parquet")
    return [reason for _, reasons in others for reason in reasons]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_images(root / "img")
    (root / "img" / "no-image.png").write_bytes(b"no image at all")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    return root


def test_evaluate_counts_every_kind_once(images: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    reasons = write_eval_tables(images)
    words = ["evaluate", "--model_name", "gen2embed-mini", "--data_dir", str(images), "--subsets", "GQA", *LIMITS]
    errors = run_twice(words, tmp_path / "out", preloaded)
    assert [list(error) for error in errors] == [["dataset", "row", "file", "reason"]] * len(reasons)
    for error, reason in zip(errors, reasons, strict=True):
        assert reason in error["reason"] + error["file"], error
        assert " at 0x" not in error["reason"]
    # Bad rows keep their number: every second of the first file, then what the other shards hold.
    first = 2 * len(STRING_ROWS) + 1
    assert [error["row"] for error in errors] == [
        *range(1, first, 2), first + 1, first + 2, *range(first + 3, first + 7)
    ]  # fmt: skip
    assert errors[-1]["file"].endswith("test-00005-of-00007.parquet")  # the shard, not the first file
    results = json.loads((tmp_path / "out" / "here" / "results.json").read_bytes())["datasets"]["GQA"]
    assert (results["num_queries"], results["num_errors"]) == (len(STRING_ROWS) + 1 + 1 + 1, len(reasons))


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


JSON_LINES: list[tuple[str, str]] = [
    ('{"anchor": "a", "positive"', "no JSON"),
    ("[1, 2]", "not an object"),
    ("NaN", "not an object"),
    ('{"anchor": NaN, "positive": "p"}', "anchor is float"),
    ("[" * 90_000, "nested too deeply"),
    ('{"anchor": ' + "9" * 5000 + ', "positive": "p"}', "no JSON"),
    ('{"anchor": 5, "positive": "p"}', "anchor is int"),
    ('{"anchor": true, "positive": "p"}', "anchor is bool"),
    ('{"anchor": null, "positive": "p"}', "anchor is null"),
    ('{"positive": "p"}', "anchor is null"),
    ('{"anchor": "", "positive": "p"}', "anchor has neither text nor image"),
    ('{"anchor": ["a", "b"], "positive": "p"}', "anchor is list"),
    ('{"anchor": {}, "positive": "p"}', "anchor has neither text nor image"),
    ('{"anchor": "a", "anchor": "b", "positive": "p"}', "the key 'anchor' is there twice"),
    ('{"anchor": "x\\ud83d", "positive": "p"}', "lone surrogate \\ud83d at character 1"),
    ('{"anchor": {"image": "x\\ud83d.png"}, "positive": "p"}', "image path of anchor is no Unicode text"),
    ('{"anchor": {"text": "a", "image_path": "img/red.png"}, "positive": "p"}', "unknown key 'image_path'"),
    ('{"anchor": {"text": "a", "img": "img/red.png"}, "positive": "p"}', "unknown key 'img'"),
    ('{"anchor": {"text": "a", "bytes": "b"}, "positive": "p"}', "unknown key 'bytes'"),
    ('{"anchor": {"image": "img/red.png", "images": ["img/red.png"]}, "positive": "p"}', 'both "image" and "images"'),
    ('{"anchor": {"text": 7}, "positive": "p"}', '"text" is int'),
    ('{"anchor": {"image": 7}, "positive": "p"}', "an image is int"),
    ('{"anchor": {"image": {"bytes": "text"}}, "positive": "p"}', '"bytes" of an image is str'),
    ('{"anchor": {"bytes": [1, 2], "path": null}, "positive": "p"}', '"bytes" of an image is list'),
    ('{"anchor": {"bytes": null, "path": 7}, "positive": "p"}', '"path" of an image is int'),
    ('{"anchor": {"image": {"path": "img/red.png", "size": 3}}, "positive": "p"}', "the unknown key 'size'"),
    ('{"anchor": {"image": {"path": ""}}, "positive": "p"}', "neither bytes nor path"),
    ('{"anchor": "' + LONG + '", "positive": "p"}', "anchor has 3000 characters"),
    ('{"anchor": "' + "z" * 120_000 + '", "positive": "p"}', "more than max_row_bytes 100000"),
    ('{"anchor": {"image": "img/none.png"}, "positive": "p"}', "not found"),
    ('{"anchor": {"image": "img/no-image.png"}, "positive": "p"}', "img/no-image.png"),
    ('{"anchor": "\udcff", "positive": "p"}', "no JSON"),  # no UTF-8
    ('{"anchor": {"image": "data:image/png;base64,' + "A" * 5000 + '"}, "positive": "p"}', "so it is no path"),
    ("\x00\x01", "no JSON"),
]
CELLS: list[tuple[Any, str]] = [
    ({"bytes": b"no image", "path": None}, "in column positive"),
    ({"bytes": png("red")[:20], "path": "red.png"}, "in column positive"),
    ({"bytes": b"", "path": ""}, "neither bytes nor path"),
    ({"bytes": None, "path": None}, "neither text nor image"),
    (None, "positive is null"),
]


def good_lines() -> Iterator[str]:
    number = 0
    while True:
        yield json.dumps({"anchor": f"query {number}", "positive": f"answer {number % 7}"})
        number += 1


def write_pairs(root: Path) -> dict[str, list[str]]:
    good = good_lines()
    lines = [line for bad, _ in JSON_LINES for line in (next(good), bad)] + [next(good)]
    (root / "lines.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    cells = [cell for bad, _ in CELLS for cell in ({"bytes": png("red"), "path": None}, bad)] + [{"bytes": png("blue")}]
    table = {"anchor": strings([b"q"] * (len(cells) - 1) + [b"\xff"]), "positive": pa.array(cells)}
    pq.write_table(pa.table(table), root / "cells.parquet")
    return {"cells": [*(reason for _, reason in CELLS), "anchor cannot be read"], "lines": [r for _, r in JSON_LINES]}


@pytest.mark.parametrize("method", [pytest.param("saha", marks=pytest.mark.exhaustive), "in-batch"])
def test_sample_counts_every_kind_once(images: Path, tmp_path: Path, preloaded: Preloaded, method: str) -> None:
    reasons = write_pairs(images)
    if method == "in-batch":  # without a model only what is opened when it is read is found
        reasons["lines"] = [reason for reason in reasons["lines"] if reason not in ("not found", "img/no-image.png")]
    words = ["sample", "--model_name", "gen2embed-mini", "--data_dir", str(images), "--method", method, *LIMITS]
    errors = run_twice([*words, "--num_hard_negatives", "2"], tmp_path / "out", preloaded)
    for name, expected in reasons.items():
        own = [error for error in errors if error["dataset"] == name]
        assert len(own) == len(expected)
        for error, reason in zip(own, expected, strict=True):
            assert reason in error["reason"] + error["file"], error
            assert error["row"] % 2 == 1 or (name, error["row"]) == ("cells", 2 * len(CELLS))
        counts = read_sampling(tmp_path / "out" / "here" / f"{name}.parquet").record["counts"]
        num_rows = 2 * len(CELLS) + 1 if name == "cells" else 2 * len(JSON_LINES) + 1
        assert (counts["rows"], counts["errors"], counts["queries"]) == (
            num_rows, len(expected), num_rows - len(expected)
        )  # fmt: skip
        assert (tmp_path / "out/here" / f"{name}.parquet").read_bytes() == (
            tmp_path / "out/process" / f"{name}.parquet"
        ).read_bytes()


def test_training_pairs_of_mmebs_form(images: Path, tmp_path: Path) -> None:
    good = {
        "qry": "q",
        "qry_image_path": "",
        "pos_text": "p",
        "pos_image_path": "",
        "neg_text": "",
        "neg_image_path": "",
    }
    bad: list[tuple[dict[str, Any], str]] = [
        ({"qry": None}, "text of qry is null"),
        ({"pos_image_path": None}, "image path of pos is null"),
        ({"qry": ""}, "the query has neither text nor image"),
        ({"neg_text": LONG}, "text of neg has 3000 characters"),
    ]
    folder = images / "VOC2007"
    folder.mkdir()
    rows = between([{**good, **change} for change, _ in bad], good)
    first = pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in good]))
    second = first.slice(0, 2).set_column(2, "pos_text", strings([b"p", b"\xed\xa0\x80"]))  # a surrogate in UTF-8
    pq.write_table(first, folder / "original-00000-of-00002.parquet")
    pq.write_table(second, folder / "original-00001-of-00002.parquet")
    config = SampleConfig(
        data_dir=str(images), output_dir=str(tmp_path / "out"), subsets=("VOC2007",), max_text_chars=2000
    )
    result = sample(PlainEncoder(), ModelRecord("p", "", "none", "p"), open_training_data(config, tmp_path), config)
    assert [error.row for error in result.errors] == [1, 3, 5, 7, 10]
    for error, (_, reason) in zip(result.errors, [*bad, ({}, "pos_text cannot be read")], strict=True):
        assert reason in error.reason
    assert [Path(error.file).name for error in result.errors[-2:]] == [
        "original-00000-of-00002.parquet",
        "original-00001-of-00002.parquet",
    ]


def test_caption_records(images: Path, tmp_path: Path) -> None:
    good = {"filename": "img/red.png", "caption": "red", "negative_caption": "blue"}
    bad: list[tuple[Any, str]] = [
        ({**good, "caption": "\ud83d"}, "lone surrogate"),
        ({**good, "filename": "\udcff.png"}, "lone surrogate"),
        ({**good, "caption": LONG}, "3000 characters"),
        ({**good, "caption": 5}, "caption is missing, empty or not a string"),
        (None, "filename is missing"),
        ([good], "filename is missing"),
        ({**good, "filename": "img/no-image.png"}, "not one of"),
    ]
    (images / "add_obj.json").write_text(json.dumps(between([record for record, _ in bad], good)))
    config = EvaluationConfig(
        data_dir=str(images),
        output_dir=str(tmp_path / "out"),
        fingerprint="p",
        subsets=("add_obj",),
        max_text_chars=2000,
    )
    result = evaluate_captions(PlainEncoder(), SUGARCREPE_BENCHMARK, config)
    assert [error.row for error in result.errors] == list(range(1, 2 * len(bad), 2))
    assert result.num_scored == len(bad) + 1
    for error, (_, reason) in zip(result.errors[:-1], bad[:-1], strict=True):
        assert reason in error.reason
    lines = (tmp_path / "out" / "errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [error.reason for error in result.errors]


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"filename": "a", "filename": "b"}]', '["\udcff"]'])
def test_a_caption_file_that_cannot_be_read(images: Path, tmp_path: Path, content: str) -> None:
    (images / "add_obj.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    words = ["evaluate", "--benchmark", "sugarcrepe", "--data_dir", str(images), "--subsets", "add_obj"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out"), "--model_name", "gen2embed-mini"]) == 2


def test_data_as_it_was_digested_before_is_digested_so_now(images: Path, tmp_path: Path) -> None:
    """Sampling folders that exist stay valid: the digest of good rows, and of rows with null cells, is unchanged."""
    (images / "pairs.jsonl").write_text(
        '{"anchor": "a", "positive": {"text": "b", "image": "img/red.png"}}\n{"anchor": null, "positive": "x"}\n'
        '{"anchor": "ü", "positive": {"image": "img/red.png", "text": null}}\n'
    )
    config = SampleConfig(data_dir=str(images / "pairs.jsonl"), output_dir=str(tmp_path / "out"), method="in-batch")
    sample(None, ModelRecord(), open_training_data(config, tmp_path / "cache"), config)
    digest = read_sampling(tmp_path / "out" / "pairs.parquet").record["data"]["digest"]
    assert digest == "6e2de7e871e7acb161278bacf2c8df58"


def test_a_very_long_instruction_is_not_multiplied(images: Path, tmp_path: Path) -> None:
    row = {
        "qry_inst": "Find:", "qry_text": "q", "tgt_inst": f"{M} " + "i" * 900_000,
        "tgt_text": ["t"] * 1000, "tgt_img_path": ["img/red.png"] * 1000,
    }  # fmt: skip
    folder = images / "MSCOCO_t2i"
    folder.mkdir()
    good = {**row, "tgt_inst": f"{M} Represent it.", "tgt_text": ["t", "u"], "tgt_img_path": ["img/red.png"] * 2}
    pq.write_table(pa.Table.from_pylist([good, row]), folder / "test.parquet")
    config = EvaluationConfig(
        data_dir=str(images), output_dir=str(tmp_path / "out"), fingerprint="p", subsets=("MSCOCO_t2i",)
    )
    result = evaluate(PlainEncoder(), MMEB, config)
    assert [(error.row, error.reason) for error in result.errors] == [
        (1, "with tgt_inst before each candidate the row has more than max_row_bytes 67108864")
    ]
