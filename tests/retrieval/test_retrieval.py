"""Images with captions: the four published layouts, recall by a slow oracle, resuming, rows that cannot be used."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from plain_encoder import PlainEncoder

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mini.benchmark import ensure
from gen2embed_mteb.mini.places import DIVERSE
from gen2embed_mteb.retrieval.datasets import COCO, FLICKR30K, SHAREGPT4V, URBAN1K, json_entries
from gen2embed_mteb.retrieval.evaluate import chosen, evaluate_retrieval, text_table
from gen2embed_mteb.retrieval.scoring import ranks_of

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}


def picture(name: str) -> Image.Image:
    return Image.new("RGB", (32, 32), COLORS[name])


def packed(name: str) -> bytes:
    out = io.BytesIO()
    picture(name).save(out, "PNG")
    return out.getvalue()


def write_parquet(folder: Path, texts: dict[str, list[str]], **more: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": more.get(n) or packed(n), "path": None}, "text": text} for n, text in texts.items()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    return folder


def write_sharegpt4v(folder: Path) -> Path:
    (folder / "coco").mkdir(parents=True)
    entries = []
    for name in COLORS:
        picture(name).save(folder / "coco" / f"{name}.png")
        said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"A {name}\npicture."}]
        entries.append({"id": name, "image": f"coco/{name}.png", "conversations": said})
    (folder / SHAREGPT4V.file).write_text(json.dumps(entries))
    return folder


def write_urban(folder: Path) -> Path:
    for part in ("caption", "image"):
        (folder / part).mkdir(parents=True)
    for number, name in enumerate(COLORS, 1):
        place = 9 + number  # 10 stands behind 9, not before it
        (folder / "caption" / f"{place}.txt").write_text(f"A {name} street.\nAnother line.\n")
        picture(name).save(folder / "image" / f"{place}.jpg")
    return folder


def settings(data: Path, output: Path, **changes: Any) -> EvaluationConfig:
    return EvaluationConfig(data_dir=str(data), output_dir=str(output), **{"fingerprint": "plain", **changes})


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    content.pop("seconds")
    return content


# Recall


def test_ranks_by_a_slow_oracle() -> None:
    chance = np.random.default_rng(0)
    images, captions = chance.normal(size=(40, 6)).astype(np.float32), chance.normal(size=(110, 6)).astype(np.float32)
    captions[50] = captions[3]  # ties, some of them with a right one
    captions[51] = captions[52]
    images[7] = images[8]
    images, captions = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, captions))
    owner = np.sort(np.concatenate([np.arange(40), chance.integers(0, 40, 70)]))
    for queries, candidates, mine, theirs in (
        (captions, images, owner, np.arange(40)),
        (images, captions, np.arange(40), owner),
    ):
        found = ranks_of(queries, candidates, mine, theirs)
        for number, query in enumerate(queries):
            scores = {j: float(np.dot(query.astype(np.float64), one)) for j, one in enumerate(candidates)}
            equal = {j: next(i for i in range(j + 1) if (candidates[i] == candidates[j]).all()) for j in scores}
            scores = {j: scores[equal[j]] for j in scores}
            best = max(score for j, score in scores.items() if theirs[j] == mine[number])
            others = [score for j, score in scores.items() if theirs[j] != mine[number]]
            assert found.official[number] == sum(score > best for score in others)
            assert found.strict[number] == sum(score >= best for score in others)
    assert found.recall(1) == (found.official < 1).mean()
    assert (found.strict >= found.official).all() and (found.strict > found.official).any()


def test_any_caption_of_an_image_counts() -> None:
    """By hand: the image's second caption is first, its first one last; at 1 it is found all the same."""
    images = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    captions = np.array([[-1.0, 0.0], [1.0, 0.0], [0.6, 0.8]], np.float32)
    found = ranks_of(images, captions, np.array([0, 1]), np.array([0, 0, 1]))
    assert found.official.tolist() == [0, 0]
    back = ranks_of(captions, images, np.array([0, 0, 1]), np.array([0, 1]))
    assert back.official.tolist() == [1, 0, 0]
    assert back.recall(1) == pytest.approx(2 / 3)


# Layouts


@pytest.mark.parametrize("name", ["flickr30k", "coco", "sharegpt4v", "urban1k", "zip"])
def test_every_layout_gives_the_recall_of_its_vectors(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    said = {"coco": lambda one: [f"{one} {number}" for number in "abcdefg"]}.get(name, lambda one: [one, f"so {one}"])
    texts = {one: said(one) for one in COLORS}
    if name in ("flickr30k", "coco"):
        write_parquet(data / "data", texts)
        captions = {one: text[:5] for one, text in texts.items()}
    elif name == "sharegpt4v":
        write_sharegpt4v(data)
        captions = {one: [f"A {one} picture."] for one in COLORS}
    else:
        write_urban(data / "Urban1k")
        captions = {one: [f"A {one} street."] for one in COLORS}
    if name == "zip":
        with zipfile.ZipFile(tmp_path / "Urban1k.zip", "w") as archive:
            for path in sorted(data.rglob("*.*")):
                archive.write(path, path.relative_to(data))
        data = tmp_path / "Urban1k.zip"
    form = "urban1k" if name == "zip" else name
    result = evaluate_retrieval(PlainEncoder(), form, settings(data, tmp_path / "out"))
    (score,) = result.scores
    assert (score.num_images, score.num_captions) == (5, sum(map(len, captions.values())))
    assert not result.errors
    found = results(tmp_path / "out")["datasets"][form]
    for direction in ("text_to_image", "image_to_text"):
        figures = found[direction]
        assert (
            figures["recall_at_1_strict"] <= figures["recall_at_1"] <= figures["recall_at_5"] <= figures["recall_at_10"]
        )
    assert found["text_to_image"]["recall_at_5"] == 1  # there are five pictures
    assert score.ranks["text_to_image"].official.shape == (sum(map(len, captions.values())),)


def test_only_the_first_entries_of_a_long_list_are_read(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    entries = [{"id": number, "text": 'a "quoted" [text], {with} \\ signs ' * 3000} for number in range(30)]
    path.write_text(json.dumps(entries) + "\n")
    assert list(json_entries(path)) == entries
    cut = path.read_text()
    path.write_text(cut[: len(cut) // 2])
    reading = json_entries(path)
    assert next(reading) == entries[0]  # nothing behind it was needed
    with pytest.raises(DataError, match="not readable as JSON"):
        list(reading)
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a JSON list"):
        list(json_entries(path))


# Runs


def test_diverse_runs_what_the_folder_holds(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_parquet(data / "flickr30k_test", {name: [name] for name in COLORS})
    write_urban(data / "Urban1k")
    config = settings(data, tmp_path / "out")
    assert chosen("diverse", config) == [FLICKR30K, URBAN1K]
    assert chosen("diverse", settings(data, tmp_path / "out", subsets=("urban1k",))) == [URBAN1K]
    result = evaluate_retrieval(PlainEncoder(), "diverse", config)
    shown = text_table(result, config)
    assert "UniME stage 1+2 (LLaVA-1.6)" in shown and "81.9" in shown and "COCO" not in shown
    assert "CLIP(ViT-L)" not in shown
    for remark in ("heads exchanged", "64.2 (61.3 over the 36)", "is +8.3 by its own figures (77.0, against"):
        assert remark in shown
    with pytest.raises(DataError, match="no coco; put them into folders of these names"):
        chosen("diverse", settings(data, tmp_path / "out", subsets=("coco",)))
    with pytest.raises(DataError, match="no dataset"):
        chosen("diverse", settings(tmp_path / "nothing", tmp_path / "out"))
    with pytest.raises(Gen2EmbedError, match="has no meta-tasks"):
        chosen(COCO.name, settings(data, tmp_path / "out", meta_tasks=("VQA",)))


def test_a_second_run_encodes_nothing_and_writes_the_same(tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "data", {name: [name, name] for name in COLORS})
    first, second = PlainEncoder(), PlainEncoder()
    evaluate_retrieval(first, "flickr30k", settings(data, tmp_path / "out"))
    assert sum(first.given.values()) == 2 * (5 + 5)  # each distinct caption and image once per side
    written = results(tmp_path / "out")
    evaluate_retrieval(second, "flickr30k", settings(data, tmp_path / "out"))
    assert not second.given
    assert results(tmp_path / "out") == written


def test_rows_that_cannot_be_used_are_set_aside(tmp_path: Path) -> None:
    texts: dict[str, Any] = {name: [name] for name in COLORS} | {"green": [], "blue": [" "]}
    data = write_parquet(tmp_path / "data", texts, white=b"no image")
    config = settings(data, tmp_path / "out", max_error_rate=1.0)
    result = evaluate_retrieval(PlainEncoder(), "flickr30k", config)
    listed = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [(one["row"], one["dataset"]) for one in listed] == [(1, "flickr30k"), (2, "flickr30k"), (3, "flickr30k")]
    assert "it has no captions" in listed[0]["reason"]
    assert "missing, empty" in listed[1]["reason"]
    assert result.scores[0].num_images == 2
    assert evaluate_retrieval(PlainEncoder(), "flickr30k", settings(data, tmp_path / "all")).too_many_errors


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("flickr30k", lambda root: None, "no Parquet file"),
        ("flickr30k", lambda root: pq.write_table(pa.table({"image": [1]}), root / "a.parquet"), "no column text"),
        ("flickr30k", lambda root: (root / "a.parquet").write_text("x"), "not readable as Parquet"),
        ("sharegpt4v", lambda root: None, "pass the folder that holds it"),
        ("urban1k", lambda root: None, "neither the folders caption and image"),
    ],
)
def test_a_folder_without_the_dataset(tmp_path: Path, name: str, make: Any, said: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=said):
        evaluate_retrieval(PlainEncoder(), name, settings(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_folder_that_is_not_there_names_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; pass Flickr30K's, or the hub id royokong/flickr30k_test"):
        evaluate_retrieval(PlainEncoder(), "flickr30k", settings(tmp_path / "none", tmp_path / "out"))


# Diverse-mini


def test_the_mini_is_drawn_once_and_every_scene_is_another(tmp_path: Path) -> None:
    root = ensure("diverse", tmp_path / "root")
    table = pq.read_table(root / DIVERSE / "flickr30k_test").to_pylist()
    captions = [text for row in table for text in row["text"]]
    assert len(table) == 200 and len(captions) == len(set(captions)) == 1000
    long = [path.read_text() for path in sorted((root / DIVERSE / "Urban1k" / "caption").iterdir())]
    assert len(set(long)) == len(long) == 200
    again = ensure("diverse", tmp_path / "again")
    for path in sorted((root / DIVERSE).rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(root)).read_bytes()
    result = evaluate_retrieval(PlainEncoder(), "diverse-mini", settings(root / DIVERSE, tmp_path / "out", limit=10))
    assert [score.dataset.name for score in result.scores] == ["flickr30k-mini", "urban1k-mini"]
    assert "Published" not in text_table(result, settings(root / DIVERSE, tmp_path / "out", limit=10))
