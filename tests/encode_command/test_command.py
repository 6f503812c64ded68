"""`gen2embed encode` and `gen2embed search`, as people type them, with the small model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from encode_jobs import content, errors, table, write_lines
from PIL import Image

from gen2embed_mteb import Gen2Embed, cli

pytestmark = pytest.mark.slow

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
TEXTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]


@pytest.fixture(scope="module")
def model() -> Gen2Embed:
    return Gen2Embed("gen2embed-mini", device="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures, one of them in a folder, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for color in COLORS:
        Image.new("RGB", (48, 40), color).save(folder / ("more" if color == "blue" else "") / f"{color}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def run(command: str, *words: str) -> int:
    return cli.main([command, *words])


def encode(data: Path, output: Path, *more: str) -> int:
    return run("encode", "--model_name", "gen2embed-mini", "--input", str(data), "--output_dir", str(output), *more)


@pytest.mark.parametrize("side", ["query", "document"])
def test_vectors_are_those_of_the_model(model: Gen2Embed, tmp_path: Path, capsys: Any, side: str) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"id": n, "text": text} for n, text in enumerate(TEXTS)])
    assert encode(data, tmp_path / "o", "--side", side, "--rows-per-shard", "6") == 0
    assert "16 x 192 float32" in capsys.readouterr().out
    want = (model.encode_query if side == "query" else model.encode_document)(TEXTS)
    found = np.array([row["vector"] for row in table(tmp_path / "o")], np.float32)
    assert np.abs(found - want).max() < 1e-6
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert manifest["side"] == side
    assert ("Represent the given" in manifest["model"]["prompt"]) == (side == "query")
    assert [part["rows"] for part in manifest["parts"]] == [6, 6, 4]


def test_a_folder_of_pictures_then_search(model: Gen2Embed, photos: Path, tmp_path: Path, capsys: Any) -> None:
    output, page = tmp_path / "o", tmp_path / "page.html"
    assert encode(photos, output, "--max_error_rate", "0.3") == 0
    assert "1 of 5 rows were set aside, see errors.jsonl" in capsys.readouterr().out
    assert [error["id"] for error in errors(output)] == ["broken.jpg"]
    names = ["green.png", "more/blue.png", "red.png", "yellow.png"]
    assert [row["id"] for row in table(output)] == names
    want = model.encode_document([{"image": photos / name} for name in names])
    assert np.abs(np.array([row["vector"] for row in table(output)]) - want).max() < 1e-6

    words = ["--index", str(output), "--query", "a blue square", "--top", "2", "--html", str(page)]
    assert run("search", *words) == 0
    printed = capsys.readouterr().out
    scores = want @ model.encode_query(["a blue square"])[0]
    best = int(scores.argmax())
    assert re.search(rf"^1 +{scores[best]:.4f} +\d +{re.escape(names[best])}$", printed, re.M)
    shown = page.read_text()
    assert shown.count("src='data:image/png;base64,") == 2
    assert not re.search(r"(?:src|href)='?http", shown)
    assert "a blue square" in shown
    assert run("search", "--index", str(output), "--image", str(photos / "red.png"), "--top", "1") == 0
    assert "red.png" in capsys.readouterr().out
    assert run("search", *words, "--scoring", "csls") == 0
    assert "Transductive: 4 rows of the index itself" in capsys.readouterr().out
    (photos / "red.png").unlink()
    assert run("search", *words[:-4], "--top", "4", "--html", str(page)) == 0
    assert "The input was changed since it was encoded" in page.read_text()


def test_an_image_column_and_a_text_make_one_input(model: Gen2Embed, photos: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"caption": text, "image_path": name} for text, name in zip(TEXTS, ("red.png", None) * 8, strict=True)]
    data = write_lines(tmp_path / "t.jsonl", rows)
    assert encode(data, tmp_path / "o", "--image_dir", str(photos)) == 0
    inputs = [{"text": row["caption"], "image": row["image_path"] and photos / row["image_path"]} for row in rows]
    found = np.array([row["vector"] for row in table(tmp_path / "o")], np.float32)
    assert np.abs(found - model.encode_document(inputs)).max() < 1e-6
    page = tmp_path / "page.html"
    assert run("search", "--index", str(tmp_path / "o"), "--query", "red", "--html", str(page), "--top", "16") == 0
    assert page.read_text().count("<img") == 8


def test_images_by_address_are_those_of_local_files(model: Gen2Embed, photos: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/photos/red.png", (photos / "red.png").read_bytes())
    rows = [{"image_path": "memory://photos/red.png"}, {"image_path": "red.png"}]
    data = write_lines(tmp_path / "t.jsonl", rows)
    words = ("--image_dir", str(photos), "--max_error_rate", "0.6")
    assert encode(data, tmp_path / "refused", *words) == 0
    assert [row["row"] for row in table(tmp_path / "refused")] == [1]
    assert encode(data, tmp_path / "o", *words, "--remote_images", "memory://photos/") == 0
    found = np.array([row["vector"] for row in table(tmp_path / "o")], np.float32)
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - model.encode_document([photos / "red.png"])[0]).max() < 1e-6
    page, asked = tmp_path / "page.html", ("--index", str(tmp_path / "o"), "--query", "red")
    assert run("search", *asked, "--html", str(page)) == 0
    assert (page.read_text().count("<img"), page.read_text().count("class='fault'")) == (1, 1)
    assert run("search", *asked, "--html", str(page), "--remote_images", "memory://photos/") == 0
    assert page.read_text().count("<img") == 2
    assert run("search", *asked, "--remote_images", "memory") == 2


def test_search_loads_the_model_of_the_index_and_no_other(tmp_path: Path, capsys: Any) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    assert encode(data, tmp_path / "o", "--prompt_mode", "system", "--precision", "int8", "--truncate_dim", "64") == 0
    assert run("search", "--index", str(tmp_path / "o"), "--query", "a red star") == 0
    assert "a red star" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    manifest["model"]["flags"]["prompt_mode"] = "none"
    (tmp_path / "o" / "manifest.json").write_text(json.dumps(manifest))
    assert run("search", "--index", str(tmp_path / "o"), "--query", "a red star") == 2
    said = capsys.readouterr().err
    assert "is not the model that" in said
    assert "--any_model" in said
    assert run("search", "--index", str(tmp_path / "o"), "--query", "a red star", "--any_model") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["encode", "--input", "nothing", "--output_dir", "o"], "nothing: no such file or folder"),
        (["encode", "--input", "e.jsonl", "--output_dir", "o"], "e.jsonl: the table has no rows"),
        (["encode", "--input", "c.jsonl", "--output_dir", "o"], "it has a, b. Name it with --text_column"),
        (["encode", "--input", "n.jsonl", "--output_dir", "o"], "none of the first 3 rows can be used: text is"),
        (["encode", "--input", "", "--output_dir", "o"], "input is empty; pass a file or folder"),
        (["encode", "--input", "c.jsonl", "--output_dir", "o", "--precision", "int4"], "known: float32, float16, int8"),
        (["encode", "--input", "t.jsonl", "--output_dir", "f"], "manifest.json was not written by gen2embed"),
        (["search", "--index", "o", "--query", "x"], "o: no manifest.json in it"),
        (["search", "--index", "o"], "nothing to search for; pass --query, --image"),
        (["search", "--index", "o", "--query", "x", "--html", "p.png"], "pass a file that ends in .html"),
        (["search", "--index", "o", "--query", "x", "--csls_sample", "9"], "with --scoring csls alone"),
    ],
)
def test_wrong_input_is_refused_before_a_model_is_loaded(
    words: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gen2embed_mteb.embedder.model.Gen2Embed", None)
    Path("e.jsonl").write_text("\n")
    write_lines(Path("c.jsonl"), [{"a": 1, "b": 2}])
    write_lines(Path("n.jsonl"), [{"text": 1}] * 3)
    write_lines(Path("t.jsonl"), [{"text": "a"}])
    write_lines(Path("f/manifest.json"), ["{}"])
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err
    assert not Path("o").exists()


def test_dimensions_that_the_model_lacks_are_refused_before_anything_is_encoded(tmp_path: Path, capsys: Any) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    assert encode(data, tmp_path / "o", "--truncate_dim", "193") == 2
    assert "truncate_dim is 193, but vectors have 192 numbers" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.exhaustive
def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    assert encode(data, tmp_path / "one", "--rows_per_shard", "3") == 0
    words = ["encode", "--model_name", "gen2embed-mini", "--input", str(data), "--output_dir", str(tmp_path / "two")]
    command = [sys.executable, "-m", "gen2embed_mteb.cli", *words, "--rows_per_shard", "3", "--device", "cpu"]
    ranks = [os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    processes = [subprocess.Popen(command, env=environment) for environment in ranks]
    try:
        assert [process.wait(240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert content(tmp_path / "two") == content(tmp_path / "one")
