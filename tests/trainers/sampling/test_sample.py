"""Sampling end to end: what is mined, what is set aside, resuming, and every kind of training data."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mmeb_files import COLOURS, M, write_images, write_table
from PIL import Image
from plain_encoder import PlainEncoder, vector

from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.cli import main
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb.tables import DataError
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.owned_folder import LEDGER, OwnedFolder
from trainers.batches.sampled import read_samplings
from trainers.data.training_data import open_training_data
from trainers.saha.clusters import mine_clusters
from trainers.sampling.files import SamplingError, read_official, read_sampling
from trainers.sampling.sample import ModelRecord, SampleConfig, SampleResult, sample, text_table

NAMES = list(COLOURS)
WORDS = ("cat", "dog", "cow", "fox", "owl")
MODEL = ModelRecord("plain", "", "none", "plain-1")


class Exact(PlainEncoder):
    """The same vector for the same input, whatever else is in the batch."""

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        super()._encode(side, inputs)
        return np.stack(
            [vector(entry.get("text", ""), [entry["image"]] if "image" in entry else []) for entry in inputs]
        )


def train_row(query: str, query_image: str, positive: str, positive_image: str = "") -> dict[str, str]:
    row = {"qry": query, "qry_image_path": query_image, "pos_text": positive, "pos_image_path": positive_image}
    return {**row, "neg_text": "", "neg_image_path": ""}


def label_rows() -> list[dict[str, str]]:
    """25 rows over five labels: every word with every colour's image, the colour being the label."""
    return [train_row(f"{M}\nName it, {word}\n", f"images/{name}.png", name) for word in WORDS for name in NAMES]


def caption_rows() -> list[dict[str, str]]:
    """25 rows, each with a candidate of its own."""
    return [
        train_row(f"Find: {name} {word}", "", f"a {word}", f"images/{name}.png") for word in WORDS for name in NAMES
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_images(root / "images")
    write_table(root / "VOC2007" / "original-00000-of-00001.parquet", label_rows())
    write_table(root / "MSCOCO_t2i" / "original-00000-of-00001.parquet", caption_rows())
    return root


BOTH = ("VOC2007", "MSCOCO_t2i")


def settings(data: Path | str, output: Path, **changes: Any) -> SampleConfig:
    values: dict[str, Any] = {"data_dir": str(data), "output_dir": str(output), "subsets": BOTH, "batch_size": 4}
    values |= {"num_hard_negatives": 2, "pool_multiplier": 2}
    return SampleConfig(**{**values, **changes})


def run(config: SampleConfig, encoder: Any = None, model: ModelRecord = MODEL) -> SampleResult:
    opened = open_training_data(config, config.images_cache)
    return sample(encoder if encoder is not None else Exact(), model, opened, config)


def vectors(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, distinct candidates, positives, computed without the library."""
    colour = {f"images/{name}.png": Image.new("RGB", (32, 32), rgb) for name, rgb in COLOURS.items()}
    distinct = list(dict.fromkeys((row["pos_text"], row["pos_image_path"]) for row in rows))
    queries = [vector(row["qry"], [colour[path] for path in [row["qry_image_path"]] if path]) for row in rows]
    candidates = [vector(text, [colour[path]] if path else []) for text, path in distinct]
    positives = [distinct.index((row["pos_text"], row["pos_image_path"])) for row in rows]
    return np.stack(queries), np.stack(candidates), np.array(positives)


def test_saha_is_algorithm_1_on_the_rows(data: Path, tmp_path: Path) -> None:
    result = run(settings(data, tmp_path / "out"))
    assert result.made == BOTH
    for name, rows in (("VOC2007", label_rows()), ("MSCOCO_t2i", caption_rows())):
        expected = mine_clusters(*vectors(rows), num_hard_negatives=2, pool_multiplier=2)
        sampling = read_sampling(tmp_path / "out" / f"{name}.parquet")
        np.testing.assert_array_equal(sampling.clusters.anchors, expected.anchors)
        np.testing.assert_array_equal(sampling.clusters.members, expected.members)
        np.testing.assert_array_equal(sampling.clusters.phase, expected.phase)
        np.testing.assert_array_equal(sampling.clusters.similarities, expected.similarities)
        in_some = np.union1d(expected.anchors, expected.members[expected.members >= 0])
        assert in_some.tolist() == list(range(25))
        counts = sampling.record["counts"]
        assert (counts["rows"], counts["queries"], counts["errors"]) == (25, 25, 0)
        assert counts["candidates"] == (5 if name == "VOC2007" else 25)
        assert counts["clusters"] == counts["phase_1"] + counts["phase_2"] == len(expected.anchors)
        both = expected.anchors.tolist() + expected.members[expected.members >= 0].tolist()
        assert counts["reused"] == sum(both.count(row) > 1 for row in set(both))
        assert counts["short"] == int((expected.members == -1).any(axis=1).sum())
    table = text_table(result)
    assert table.splitlines()[-1].startswith("total")
    assert max(map(len, table.splitlines())) <= 120


@pytest.mark.parametrize(("method", "beta"), [("hn", None), ("hn-beta", 0.02), ("hn-beta", -0.02)])
def test_hard_negatives_name_the_first_row_that_has_the_candidate(
    data: Path, tmp_path: Path, method: str, beta: float | None
) -> None:
    run(settings(data, tmp_path / "out", method=method, **({} if beta is None else {"beta": beta})))
    dropped = 0
    for name, rows in (("VOC2007", label_rows()), ("MSCOCO_t2i", caption_rows())):
        queries, candidates, positives = vectors(rows)
        sampling = read_sampling(tmp_path / "out" / f"{name}.json", methods=("hn", "hn-beta"))
        assert sampling.clusters.anchors.tolist() == list(range(25))
        for query in range(25):
            scores = np.round(candidates.astype(np.float64) @ queries[query].astype(np.float64), 6)  # ties stay ties
            best = [c for c in np.argsort(-scores, kind="stable").tolist() if c != positives[query]]
            if beta is not None:
                kept = [c for c in best if scores[c] <= scores[positives[query]] + beta]
                dropped += kept[:2] != best[:2]
                best = kept
            expected = [positives.tolist().index(candidate) for candidate in best[:2]]
            assert [row for row in sampling.clusters.members[query].tolist() if row >= 0] == expected
        assert "only its positive is meant" in sampling.record["meaning"]
        assert sampling.record["settings"]["beta"] == beta
    assert (dropped > 0) == (beta == -0.02)


def test_copies_of_a_picture_under_two_names_are_one_candidate(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "images" / "red.png", data / "images" / "copy.png")
    names = ("red", "copy", *(name for name in NAMES if name != "red"))
    rows = [train_row(f"Find {number}", "", "", f"images/{name}.png") for number, name in enumerate(names)]
    write_table(data / "MSCOCO_t2i" / "original-00000-of-00001.parquet", rows)
    for method in ("hn", "saha"):
        config = settings(data, tmp_path / method, method=method, subsets=("MSCOCO_t2i",), num_hard_negatives=4)
        run(config)
        sampling = read_sampling(tmp_path / method / "MSCOCO_t2i.json", methods=("hn", "saha"))
        assert sampling.record["counts"]["candidates"] == len(names) - 1
        for anchor, members in zip(sampling.clusters.anchors, sampling.clusters.members, strict=True):
            assert not {0, 1} <= {int(anchor), *members.tolist()}


def test_in_batch_needs_no_model(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "out", method="in-batch")
    sample(None, ModelRecord(), open_training_data(config, config.images_cache), config)
    sampling = read_sampling(tmp_path / "out" / "VOC2007.parquet")
    assert sampling.clusters.anchors.tolist() == list(range(25))
    assert sampling.clusters.members.shape == (25, 0)
    assert not (tmp_path / "out" / "embeddings").exists()
    with pytest.raises(ValueError, match="saha needs an encoder"):
        sample(None, ModelRecord(), open_training_data(config, config.images_cache), settings(data, tmp_path / "o"))


def test_the_official_variant_collapses_queries_and_does_not_rerank_labels(data: Path, tmp_path: Path) -> None:
    rows = label_rows()
    rows[7] = {**rows[2], "pos_text": "blue green"}  # the query of row 2 again, with another positive
    for name in BOTH:
        write_table(data / name / "original-00000-of-00001.parquet", rows)
    run(settings(data, tmp_path / "out", variant="official"))
    kept = [0, 1, 7, *(number for number in range(3, 25) if number != 7)]
    arrays = vectors([rows[number] for number in kept])
    for name, labelled in (("VOC2007", True), ("MSCOCO_t2i", False)):
        sampling = read_sampling(tmp_path / "out" / f"{name}.parquet")
        expected = mine_clusters(*arrays, 2, 2, variant="official", labelled=labelled)
        assert sampling.clusters.anchors.tolist() == [kept[query] for query in expected.anchors]
        assert sampling.record["settings"]["labelled"] is labelled
        assert sampling.record["counts"]["collapsed"] == 1
        assert 2 not in sampling.clusters.members
    run(settings(data, tmp_path / "paper"))
    assert read_sampling(tmp_path / "paper" / "VOC2007.json").record["counts"]["collapsed"] == 0


def test_rows_without_a_usable_image_are_set_aside(data: Path, tmp_path: Path) -> None:
    rows = caption_rows()
    rows[3]["pos_image_path"] = "images/none.png"
    rows[9]["qry"] = ""
    write_table(data / "MSCOCO_t2i" / "original-00000-of-00001.parquet", rows)
    result = run(settings(data, tmp_path / "out"))
    assert result.too_many_errors
    assert not run(settings(data, tmp_path / "out", max_error_rate=0.1)).too_many_errors
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [(error["dataset"], error["row"]) for error in errors] == [("MSCOCO_t2i", 3), ("MSCOCO_t2i", 9)]
    assert errors[0]["file"] == "images/none.png"
    assert "neither text nor image" in errors[1]["reason"]
    sampling = read_sampling(tmp_path / "out" / "MSCOCO_t2i.parquet")
    clusters = sampling.clusters
    rest = [number for number in range(25) if number not in (3, 9)]
    assert np.union1d(clusters.anchors, clusters.members[clusters.members >= 0]).tolist() == rest
    assert sampling.record["counts"]["errors"] == 2
    assert sampling.record["counts"]["candidates"] == 23


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.parquet")}


def test_finished_subsets_are_left_alone(data: Path, tmp_path: Path) -> None:
    run(settings(data, tmp_path / "out"))
    before = files(tmp_path / "out")
    encoder = Exact()
    assert run(settings(data, tmp_path / "out"), encoder).made == ()
    assert not encoder.given
    (tmp_path / "out" / "VOC2007.json").unlink()
    assert run(settings(data, tmp_path / "out"), encoder).made == ("VOC2007",)
    assert not encoder.given
    assert files(tmp_path / "out") == before


def test_rows_that_were_set_aside_are_tried_again(data: Path, tmp_path: Path) -> None:
    image = data / "images" / "red.png"
    hidden = image.rename(tmp_path / "red.png")
    assert len(run(settings(data, tmp_path / "out")).errors) == 10  # five queries, five candidates
    before, errors = files(tmp_path / "out"), (tmp_path / "out" / "errors.jsonl").read_bytes()
    encoder = Exact()
    assert len(run(settings(data, tmp_path / "out"), encoder).errors) == 10
    assert not encoder.given
    assert files(tmp_path / "out") == before
    assert (tmp_path / "out" / "errors.jsonl").read_bytes() == errors
    # The errors of a subset that this run is not about stay in the list.
    run(settings(data, tmp_path / "out", subsets=BOTH[:1]))
    assert (tmp_path / "out" / "errors.jsonl").read_bytes() == errors
    hidden.rename(image)
    assert not run(settings(data, tmp_path / "out")).errors
    assert (tmp_path / "out" / "errors.jsonl").read_bytes() == b""
    run(settings(data, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


CHANGES: dict[str, dict[str, Any]] = {
    "num_hard_negatives was 2, now 3": {"num_hard_negatives": 3},
    "method was 'saha', now 'hn'": {"method": "hn"},
    "variant was 'paper', now 'official'": {"variant": "official"},
    "data was": {"limit": 20},
}


@pytest.mark.parametrize("said", CHANGES)
def test_files_made_otherwise_are_refused_or_replaced(data: Path, tmp_path: Path, said: str) -> None:
    run(settings(data, tmp_path / "out"))
    before = files(tmp_path / "out")
    encoder = Exact()
    with pytest.raises(SamplingError, match=f"VOC2007.json: made by another run .*{said}.*--overwrite"):
        run(settings(data, tmp_path / "out", **CHANGES[said]), encoder)
    assert not encoder.given
    assert files(tmp_path / "out") == before
    assert run(settings(data, tmp_path / "out", overwrite=True, **CHANGES[said])).made == BOTH
    run(settings(data, tmp_path / "fresh", **CHANGES[said]))
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_another_model_is_refused_or_replaces(data: Path, tmp_path: Path) -> None:
    run(settings(data, tmp_path / "out"))
    other = ModelRecord("other", "", "none", "other-1")
    with pytest.raises(SamplingError, match="model was 'plain-1', now 'other-1'"):
        run(settings(data, tmp_path / "out"), model=other)
    for name in BOTH:
        (tmp_path / "out" / f"{name}.json").unlink()
    with pytest.raises(StoreMismatchError, match="--overwrite"):
        run(settings(data, tmp_path / "out"), model=other)
    assert run(settings(data, tmp_path / "out", overwrite=True), model=other).made == BOTH


def test_interrupted_anywhere_it_ends_in_the_same_bytes(data: Path, tmp_path: Path) -> None:
    class Interrupted(PlainEncoder):
        def __init__(self, calls: int) -> None:
            super().__init__()
            self.calls = calls

        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
            return super()._encode(side, inputs)

    run(settings(data, tmp_path / "whole"), PlainEncoder())  # its vectors depend on the batch
    for stop in (0, 3, 8, 11, 20):
        output = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings(data, output), Interrupted(stop))
        run(settings(data, output), PlainEncoder())
        assert files(output) == files(tmp_path / "whole")
    # With one subset alone, or with vectors that another method left, the bytes are the same too.
    run(settings(data, tmp_path / "one", subsets=BOTH[1:]), PlainEncoder())
    assert files(tmp_path / "one").items() <= files(tmp_path / "whole").items()
    run(settings(data, tmp_path / "hn", method="hn", embedding_dir=str(tmp_path / "vectors")), PlainEncoder())
    encoder = PlainEncoder()
    run(settings(data, tmp_path / "shared", embedding_dir=str(tmp_path / "vectors")), encoder)
    assert not encoder.given
    assert files(tmp_path / "shared") == files(tmp_path / "whole")


def test_only_the_first_of_several_processes_writes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings(data, tmp_path / "first"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    encoder = Exact()
    result = run(settings(data, tmp_path / "out", embedding_dir=str(tmp_path / "first" / "embeddings")), encoder)
    assert not encoder.given
    assert result.records == ()
    assert not result.too_many_errors
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("method", ["saha", "hn"])
def test_the_official_form_is_written_beside_and_read(data: Path, tmp_path: Path, method: str) -> None:
    run(settings(data, tmp_path / "out", method=method, file_format="official", subsets=BOTH[1:]))
    entries = json.loads((tmp_path / "out" / "MSCOCO_t2i_hard_negatives.json").read_text())
    clusters = read_sampling(tmp_path / "out" / "MSCOCO_t2i.parquet").clusters
    rows = caption_rows()
    for entry, anchor, members in zip(entries, clusters.anchors, clusters.members, strict=True):
        chosen = [rows[member] for member in members if member >= 0]
        if method == "saha":
            assert entry == {**rows[anchor], "neg_samples": chosen}
        else:
            assert entry["neg_image_path"] == [row["pos_image_path"] for row in chosen]
    read_method, read = read_official(tmp_path / "out" / "MSCOCO_t2i_hard_negatives.json", rows)
    assert read_method == method
    np.testing.assert_array_equal(read.members[:, :2], clusters.members)
    # A run without it does not leave an old one beside new clusters.
    run(settings(data, tmp_path / "out", method=method, subsets=BOTH[1:], num_hard_negatives=1, overwrite=True))
    assert not (tmp_path / "out" / "MSCOCO_t2i_hard_negatives.json").exists()


def test_everything_is_checked_before_the_model_works(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no parquet file of ImageNet-1K.*usable: --subsets VOC2007 MSCOCO_t2i"):
        open_training_data(settings(data, tmp_path / "out", subsets=()), tmp_path)
    row = train_row("q", "", "p")
    del row["pos_text"]
    write_table(data / "VOC2007" / "original-00000-of-00001.parquet", [row])
    with pytest.raises(DataError, match=r"VOC2007.*no column pos_text"):
        open_training_data(settings(data, tmp_path / "out"), tmp_path)
    with pytest.raises(ValueError, match="unknown subset 'VOC2006'; did you mean"):
        open_training_data(settings(data, tmp_path / "out", subsets=("VOC2006",)), tmp_path)
    with pytest.raises(DataError, match="no such folder or file"):
        open_training_data(settings(tmp_path / "none", tmp_path / "out"), tmp_path)
    assert not (tmp_path / "out").exists()


def test_splits_and_subsets_of_ones_own(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "VOC2007", data / "Mine")
    (data / "Mine" / "original-00000-of-00001.parquet").rename(data / "Mine" / "diverse_instruction.parquet")
    opened = open_training_data(settings(data, tmp_path, split="diverse_instruction", subsets=()), tmp_path)
    assert [subset.name for subset in opened.subsets] == ["Mine"]
    assert opened.split == "diverse_instruction"
    (data / "ImageNet_1K").mkdir()
    shutil.copy(data / "VOC2007" / "original-00000-of-00001.parquet", data / "ImageNet_1K")
    opened = open_training_data(settings(data, tmp_path, subsets=("imagenet-1k",)), tmp_path)
    assert [subset.name for subset in opened.subsets] == ["ImageNet_1K"]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def pair_folder(root: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The rows of `caption_rows`, image positives without text, in each kind of two-column data."""
    queries = [row["qry"] for row in caption_rows()]
    colours = [name for _ in WORDS for name in NAMES]
    write_images(root / "images")
    paths = [f"images/{name}.png" for name in colours]
    structs = [{"bytes": png(name), "path": f"{name}.png"} for name in colours]
    if kind == "parquet with bytes":
        pq.write_table(pa.table({"anchor": queries, "positive": structs}), root / "pairs.parquet")
        return root / "pairs.parquet", {}
    if kind == "parquet with paths":
        pq.write_table(pa.table({"query": queries, "positive": paths}), root / "pairs.parquet")
        return root / "pairs.parquet", {"image_columns": ("positive",)}
    if kind == "jsonl":
        lines = [{"q": query, "p": {"image": path}} for query, path in zip(queries, paths, strict=True)]
        (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return root / "pairs.jsonl", {"columns": ("q", "p")}
    if kind == "folder of shards":
        table = pa.table({"anchor": queries, "positive": [{"bytes": None, "path": path} for path in paths]})
        pq.write_table(table.slice(0, 13), root / "pairs-00000-of-00002.parquet")
        pq.write_table(table.slice(13), root / "pairs-00001-of-00002.parquet")
        return root, {}
    features = datasets.Features({"anchor": datasets.Value("string"), "positive": datasets.Image()})
    made = datasets.Dataset.from_dict({"anchor": queries, "positive": structs}, features=features)
    made.save_to_disk(root / "pairs")
    return root / "pairs", {}


@pytest.mark.parametrize(
    "kind", ["parquet with bytes", "parquet with paths", "jsonl", "folder of shards", "save_to_disk"]
)
def test_two_columns_in_every_form(tmp_path: Path, kind: str) -> None:
    path, options = pair_folder(tmp_path, kind)
    result = run(settings(path, tmp_path / "out", subsets=(), **options))
    assert result.made == ("pairs",)
    assert not result.errors
    rows = [{**row, "pos_text": ""} for row in caption_rows()]
    expected = mine_clusters(*vectors(rows), num_hard_negatives=2, pool_multiplier=2)
    sampling = read_sampling(tmp_path / "out" / "pairs.parquet")
    np.testing.assert_array_equal(sampling.clusters.members, expected.members)
    assert sampling.record["counts"]["candidates"] == 5
    assert sampling.record["data"]["split"] == "train"
    cached = [file for file in (tmp_path / "out" / "images-cache").rglob("*") if file.is_file()]
    # Embedded images are kept once each; those that have a path are not copied.
    assert len(cached) == (5 if kind in ("parquet with bytes", "save_to_disk") else 0)
    encoder = Exact()
    assert run(settings(path, tmp_path / "out", subsets=(), **options), encoder).made == ()


def test_the_hub_in_either_form(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself is stood in for by local files; what is loaded from it are real `datasets`."""
    loaded = {
        "VOC2007": datasets.Dataset.from_list(label_rows()),
        "words": datasets.Dataset.from_dict(
            {"anchor": ["a b", "c d"], "positive": [{"path": None, "bytes": png("red")}, {"path": None, "bytes": b""}]},
        ).cast_column("positive", datasets.Image()),
    }
    names = ["VOC2007", "MSCOCO_t2i"]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda _, revision: names)
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id, name, split, revision=None: loaded[name])
    with pytest.raises(FileNotFoundError, match="--image_dir"):
        run(settings("owner/name", tmp_path / "hub", subsets=("VOC2007",)))
    run(settings("owner/name", tmp_path / "hub", subsets=("VOC2007",), image_dir=str(data)))
    run(settings(data, tmp_path / "local", subsets=("VOC2007",)))
    assert files(tmp_path / "hub") == files(tmp_path / "local")
    names = ["words"]
    result = run(settings("owner/name", tmp_path / "pairs", subsets=()))
    assert result.made == ("words",)
    assert [error.row for error in result.errors] == [1]  # its image has neither bytes nor path
    with pytest.raises(ValueError, match="unknown subset 'letters'"):
        run(settings("owner/name", tmp_path / "pairs", subsets=("letters",)))

    asked: list[str | None] = []
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda _, revision: asked.append(revision) or names)
    assert run(settings("owner/name@v1", tmp_path / "pinned", subsets=())).made == ("words",)
    assert asked == ["v1"]

    def offline(_: str, revision: str | None) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_config_names", offline)
    with pytest.raises(DataError, match=r"owner/name: cannot be looked up \(no network\)"):
        run(settings("owner/name", tmp_path / "pairs", subsets=()))


def test_text_that_looks_like_a_path_stays_text(tmp_path: Path) -> None:
    table = pa.table({"anchor": ["images/red.png", "b", None, ""], "positive": ["x.jpg", "y", "z", "w"]})
    pq.write_table(table, tmp_path / "texts.parquet")
    encoder = Exact()
    result = run(settings(tmp_path / "texts.parquet", tmp_path / "out", subsets=()), encoder)
    assert ("query", "images/red.png", ()) in encoder.given
    assert [(error.row, error.reason.split(",")[0]) for error in result.errors] == [
        (2, "anchor is null"),
        (3, "anchor has neither text nor image"),
    ]


def test_two_columns_that_cannot_be_used(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "pairs.parquet")
    for path, options, said in (
        ("pairs.parquet", {}, r"no columns anchor \(or query\) and positive; it has a, b.*--columns"),
        ("pairs.parquet", {"columns": ("a", "c")}, "no columns a and c"),
        ("pairs.parquet", {"columns": ("a", "b"), "image_columns": ("c",)}, "not among"),
        ("empty", {}, "neither MMEB-train's form"),
        ("bad.parquet", {}, "not a readable parquet file"),
        ("bad.jsonl", {}, "line 1: no JSON"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "bad.parquet").write_bytes(b"no")
        (tmp_path / "bad.jsonl").write_text('{"anchor": "a", "positive"\n{"anchor"\n')
        with pytest.raises(DataError, match=said):
            run(settings(tmp_path / path, tmp_path / "out", subsets=(), **options))
    with pytest.raises(ValueError, match="--format parquet"):
        changes = {"columns": ("a", "b"), "file_format": "official", "subsets": ()}
        run(settings(tmp_path / "pairs.parquet", tmp_path / "out", **changes))


def tree(root: Path) -> dict[str, bytes]:
    """Every file that a user sees, by its path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def pairs_file(path: Path) -> Path:
    """Six pairs, as Parquet or JSON lines."""
    rows = [{"anchor": f"q{number}", "positive": f"p{number}"} for number in range(6)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved_to_disk(path: Path) -> Path:
    datasets.Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]}).save_to_disk(path)
    return path


DATA_FOLDERS: dict[str, tuple[Any, str, str]] = {
    # What is written; --data_dir and --output_dir below the folder it is written to.
    "a file and its folder": (lambda root: pairs_file(root / "train.parquet"), "train.parquet", "."),
    "a folder and itself": (lambda root: pairs_file(root / "train.parquet"), ".", "."),
    "JSON lines and their folder": (lambda root: pairs_file(root / "train.jsonl"), "train.jsonl", "."),
    "a folder of JSON lines": (lambda root: pairs_file(root / "train.jsonl"), ".", "."),
    "by another name": (lambda root: pairs_file(root / "d" / "a.parquet"), "d/a.parquet", "d/../d"),
    "through a link": (
        lambda root: [pairs_file(root / "d" / "a.parquet"), (root / "link").symlink_to("d")],
        "d",
        "link",
    ),
    "shards": (lambda root: pairs_file(root / "a-00000-of-00001.parquet"), ".", "."),
    "save_to_disk": (lambda root: saved_to_disk(root / "pairs"), "pairs", "pairs"),
    "a split of a saved DatasetDict": (
        lambda root: datasets.DatasetDict(
            {"train": datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})}
        ).save_to_disk(root / "d"),
        "d",
        "d/train",
    ),
    "tables in a folder data": (lambda root: pairs_file(root / "d" / "data" / "a.parquet"), "d", "d/data"),
    "the folder above a folder data": (lambda root: pairs_file(root / "d" / "data" / "a.parquet"), "d", "d"),
    "MMEB-train's root": (
        lambda root: write_table(root / "Mine" / "original-00000-of-00001.parquet", caption_rows()),
        ".",
        ".",
    ),
    "MMEB-train's subset": (
        lambda root: write_table(root / "Mine" / "original-00000-of-00001.parquet", caption_rows()),
        ".",
        "Mine",
    ),
    "a folder of MMEB-train's split": (
        lambda root: write_table(root / "Mine" / "original.parquet", caption_rows()),
        ".",
        "new/original",
    ),
    "a subset that is called as the split": (
        lambda root: write_table(root / "original" / "original.parquet", caption_rows()),
        ".",
        "data/new",
    ),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", DATA_FOLDERS)
def test_the_training_data_is_no_place_for_clusters(tmp_path: Path, case: str, overwrite: bool) -> None:
    make, data_dir, output_dir = DATA_FOLDERS[case]
    make(tmp_path)
    before, encoder = tree(tmp_path), Exact()
    with pytest.raises(Gen2EmbedError, match=r"another --output_dir|a folder of their own"):
        run(settings(tmp_path / data_dir, tmp_path / output_dir, subsets=(), overwrite=overwrite), encoder)
    assert not encoder.given
    assert tree(tmp_path) == before


def test_hidden_twins_of_sampling_files_are_not_trained_on(tmp_path: Path) -> None:
    """Copying to a foreign disk makes macOS write `._NAME` beside every file."""
    pairs_file(tmp_path / "data" / "cats.parquet")
    run(settings(tmp_path / "data", tmp_path / "out", subsets=()))
    for suffix in (".parquet", ".json"):
        (tmp_path / "out" / f"._cats{suffix}").write_bytes(b"\0\5\x16\7")
    assert [one.record["subset"] for one in read_samplings(str(tmp_path / "out"))] == ["cats"]


def test_a_saved_dataset_is_called_after_its_folder_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved_to_disk(tmp_path / "pairs"))
    assert run(settings(".", tmp_path / "out", subsets=())).made == ("pairs",)


def test_a_folder_of_its_own_below_the_data_is_fine(tmp_path: Path) -> None:
    pairs_file(tmp_path / "train.parquet")
    for _ in range(2):
        assert run(settings(tmp_path, tmp_path / "sampled", subsets=())).records[0]["subset"] == "train"
    assert run(settings(tmp_path, tmp_path / "again", subsets=())).made == ("train",)


FOREIGN: dict[str, Any] = {
    "VOC2007.parquet": pairs_file,
    "VOC2007.json": lambda path: path.write_text("{}"),
    "errors.jsonl": lambda path: path.write_text('{"dataset": "of another program"}\n'),
    "MSCOCO_t2i_hard_negatives.json": lambda path: path.write_text("[]"),
    "MSCOCO_t2i.parquet": lambda path: path.mkdir(),
    "MSCOCO_t2i.json": lambda path: path.symlink_to("elsewhere.json"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_another_program_made_is_refused_before_anything_is_encoded(
    data: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    FOREIGN[name](output / name)
    before, encoder = tree(output), Exact()
    with pytest.raises((ForeignFileError, SamplingError), match=re.escape(name)):
        run(settings(data, output, overwrite=overwrite, file_format="official"), encoder)
    assert not encoder.given
    assert tree(output) == before


@pytest.mark.parametrize("name", ["VOC2007.parquet", "VOC2007.json", "errors.jsonl"])
def test_an_edited_file_is_the_users_and_overwrite_replaces_the_rest(data: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    run(settings(data, output))
    whole = (output / name).read_bytes()
    (output / name).write_bytes(whole + b"\n")
    before, encoder = tree(output), Exact()
    with pytest.raises(ForeignFileError, match=f"{re.escape(name)} was changed since gen2embed wrote it.*move it away"):
        run(settings(data, output, num_hard_negatives=3, overwrite=True), encoder)
    assert not encoder.given
    assert tree(output) == before
    (output / name).write_bytes(whole)
    assert run(settings(data, output, num_hard_negatives=3, overwrite=True)).made == BOTH


def test_the_errors_of_an_evaluation_are_not_replaced(data: Path, tmp_path: Path) -> None:
    OwnedFolder(tmp_path / "out", "evaluate").write("errors.jsonl", b"")
    with pytest.raises(ForeignFileError, match=r"errors\.jsonl was written by gen2embed evaluate"):
        run(settings(data, tmp_path / "out", overwrite=True))


def test_a_folder_of_an_earlier_version_is_read_and_not_replaced(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(settings(data, output))
    (output / LEDGER).unlink()
    before, encoder = tree(output), Exact()
    assert run(settings(data, output), encoder).made == ()
    with pytest.raises(SamplingError, match=r"VOC2007\.json: sampled by a version.*another --output_dir"):
        run(settings(data, output, num_hard_negatives=3, overwrite=True), encoder)
    assert not encoder.given
    assert tree(output) == before
    for path in output.glob("VOC2007.*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(ForeignFileError, match=r"errors\.jsonl"):
        run(settings(data, output))
    (output / "errors.jsonl").unlink()
    assert run(settings(data, output)).made == ("VOC2007",)
    assert files(output)["VOC2007.parquet"] == before["VOC2007.parquet"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cats_hard_negatives", "official form of another subset"),
        (".hidden", "begins with a dot"),
        (".gen2embed-files", "begins with a dot"),
        ("a\\b", "no file name should have"),
        ("a\nb", "no file name should have"),
        ("é" * 120, "too long"),
        ("x" * 240, "too long"),
    ],
)
def test_names_that_no_file_can_have_are_refused_before_anything_is_encoded(
    tmp_path: Path, name: str, said: str
) -> None:
    source = pairs_file(tmp_path / "data" / f"{name}.parquet")
    encoder = Exact()
    with pytest.raises(Gen2EmbedError, match=said):
        run(settings(source, tmp_path / "out", subsets=()), encoder)
    assert not encoder.given


@pytest.mark.parametrize("name", ["train", "errors", "embeddings", "images-cache", "con fig", "ünï", "x" * 230])
def test_names_that_look_odd_are_sampled(tmp_path: Path, name: str) -> None:
    source = pairs_file(tmp_path / "data" / f"{name}.parquet")
    for made in ((name,), ()):
        assert run(settings(source, tmp_path / "out", subsets=())).made == made
    assert read_sampling(tmp_path / "out" / f"{name}.json").record["subset"] == name


def test_subsets_that_differ_in_case_are_both_sampled(tmp_path: Path) -> None:
    for name in ("Cats", "cats"):
        pairs_file(tmp_path / "data" / f"{name}.jsonl")
    assert run(settings(tmp_path / "data", tmp_path / "out", subsets=())).made == ("Cats", "cats")
    for name in ("Cats", "cats"):
        assert read_sampling(tmp_path / "out" / f"{name}.json").record["subset"] == name


def test_a_record_that_is_damaged_is_one_line_when_sampling_again(data: Path, tmp_path: Path) -> None:
    run(settings(data, tmp_path / "out"))
    record = tmp_path / "out" / "VOC2007.json"
    whole = record.read_bytes()
    for damage in (
        lambda content: content["settings"].update(num_hard_negatives=None),
        lambda content: content["settings"].update(num_hard_negatives=10**12),
        lambda content: content.update(subset=["VOC2007"]),
        lambda content: content["seconds"].pop("mine"),
        lambda content: content["counts"].update(errors="0"),
    ):
        content = json.loads(whole)
        damage(content)
        record.write_text(json.dumps(content))
        with pytest.raises(Gen2EmbedError, match=r"VOC2007\.json") as caught:
            run(settings(data, tmp_path / "out"))
        assert len(str(caught.value).splitlines()) == 1
    record.unlink()
    assert run(settings(data, tmp_path / "out")).made == ("VOC2007",)


@pytest.mark.parametrize(
    "line",
    [
        '{"dataset": [], "row": 1, "file": "", "reason": ""}',
        '{"dataset": "VOC2007", "row": "1", "file": "", "reason": ""}',
        '{"dataset": "VOC2007", "row": 1, "file": null, "reason": ""}',
        '{"dataset": "VOC2007"}',
        "[]",
        "[" * 100_000,
        "\x00",
    ],
)
def test_errors_that_are_damaged_are_one_line(data: Path, tmp_path: Path, line: str) -> None:
    (data / "images" / "red.png").unlink()
    run(settings(data, tmp_path / "out"))  # ten rows are tried again by the next run
    OwnedFolder(tmp_path / "out", "sample").write("errors.jsonl", line.encode())
    with pytest.raises(SamplingError, match=r"errors\.jsonl, line 1: damaged") as caught:
        run(settings(data, tmp_path / "out"))
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_refuses_before_it_loads_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pairs_file(tmp_path / "train.parquet")
    before = tree(tmp_path)
    for overwrite in ([], ["--overwrite"]):
        words = ["sample", "--model_name", str(tmp_path / "no model"), "--data_dir", str(source)]
        assert main([*words, "--output_dir", str(tmp_path), *overwrite]) == 2
        said = capsys.readouterr().err
        assert "is the folder of the training data" in said
        assert len(said.splitlines()) == 1
    assert tree(tmp_path) == before


def test_a_subset_without_a_usable_row(data: Path, tmp_path: Path) -> None:
    write_table(data / "VOC2007" / "original-00000-of-00001.parquet", [train_row("", "", "p")])
    run(settings(data, tmp_path / "out", max_error_rate=1.0))
    assert read_sampling(tmp_path / "out" / "VOC2007.json").record["counts"]["clusters"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hard_negatives": 0}, "num_hard_negatives is 0"),
        ({"num_hard_negatives": 10**12}, "num_hard_negatives is 1000000000000; pass 10,000 or fewer"),
        ({"pool_multiplier": 0}, "pool_multiplier is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"min_side": -1}, "min_side is -1"),
        ({"max_error_rate": 2}, "max_error_rate is 2"),
        ({"beta": 3}, "beta is 3"),
        ({"method": "best"}, "method is 'best'; known: saha, hn"),
        ({"variant": "other"}, "variant is 'other'; known: paper, official"),
        ({"resize": "big"}, "resize is 'big'; known: processor"),
        ({"file_format": "json"}, "file_format is 'json'"),
        ({"file_format": "official", "method": "in-batch"}, "--format parquet"),
        ({"columns": ("a",)}, "pass two names"),
        ({"data_dir": ""}, "data_dir is empty"),
        ({"output_dir": ""}, "output_dir is empty"),
    ],
)
def test_settings_are_checked_at_once(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig(**{"data_dir": "d", "output_dir": str(tmp_path), **change})


class PerDataset(Exact):
    """An encoder with prompts for one dataset: a prompt is a word behind the text."""

    def __init__(self, prompts: dict[str, str], known: str = "") -> None:
        super().__init__()
        self.prompts, self._known, self.asked = prompts, known, []

    def for_dataset(self, dataset: str, /) -> Any:
        self.asked.append(dataset)
        return PerDataset({"query": "cat", "document": "owl"}) if dataset == self._known else None

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        said = [{**entry, "text": f"{entry.get('text', '')} {self.prompts.get(side, '')}"} for entry in inputs]
        return super()._encode(side, said)


def test_a_subset_is_mined_with_its_own_prompts(data: Path, tmp_path: Path) -> None:
    encoder = PerDataset({}, "MSCOCO_t2i")
    run(settings(data, tmp_path / "out"), encoder)
    run(settings(data, tmp_path / "plain"), Exact())
    assert sorted(set(encoder.asked)) == sorted(BOTH)
    mined = {
        (folder, name): read_sampling(tmp_path / folder / f"{name}.json").clusters.similarities
        for folder in ("out", "plain")
        for name in BOTH
    }
    assert np.array_equal(mined["out", "VOC2007"], mined["plain", "VOC2007"], equal_nan=True)
    assert not np.allclose(mined["out", "MSCOCO_t2i"], mined["plain", "MSCOCO_t2i"], atol=1e-3, equal_nan=True)


def test_a_model_of_text_alone_is_refused_before_anything_is_encoded(data: Path, tmp_path: Path) -> None:
    words = [train_row(f"{word} one", "", word) for word in WORDS]
    write_table(data / "HatefulMemes" / "original-00000-of-00001.parquet", words)
    encoder = Exact(text_alone="words takes text alone")
    with pytest.raises(Gen2EmbedError, match=r"text alone, and .* in VOC2007, MSCOCO_t2i: .* --subsets HatefulMemes$"):
        run(settings(data, tmp_path / "out", subsets=(*BOTH, "HatefulMemes")), encoder)
    assert not encoder.given
    assert not (tmp_path / "out").exists()
    assert run(settings(data, tmp_path / "out", subsets=("HatefulMemes",)), encoder).made == ("HatefulMemes",)
