"""`gen2embed analyze`, as people type it."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from mmeb_files import colour_rows, write_images, write_table
from PIL import Image

from gen2embed_mteb import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: Any) -> str:
    """MMEB-mini with few rows."""
    from gen2embed_mteb.mini import benchmark

    root = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_QUERIES", 6)
        benchmark.ensure("eval", root)
    return str(root)


def analyze(output: Path, kind: str, *more: str) -> int:
    return cli.main(["analyze", kind, "--model_name", "gen2embed-mini", "--output_dir", str(output), *more])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"}


def test_every_analysis_prints_figures_and_writes_the_same_files_again(
    data_dir: str, tmp_path: Path, capsys: Any
) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    mini = ("--benchmark", "mmeb-mini", "--data_dir", data_dir, "--limit", "6")
    commands = {
        "attention": ("--image", str(tmp_path / "red.png"), "--text", "What color is it?"),
        "space": (*mini, "--subsets", "Digits", "--projection", "pca", "--format", "svg", "png", "parquet"),
        "words": (*mini, "--subsets", "Digits", "--limit", "1"),
    }
    printed = {}
    for kind, words in commands.items():
        assert analyze(tmp_path / "out", kind, *words) == 0
        printed[kind] = capsys.readouterr().out
    assert "ε under uniform attention: system" in printed["attention"]
    assert "user turn, behind the input" in printed["attention"]
    assert "Digits: 6 queries (image + text)" in printed["space"]
    assert "Digits 0 [image]" in printed["words"]
    first = files_of(tmp_path / "out")
    drawn = {f"{kind}.{ending}" for kind in commands for ending in ("json", "svg", "png")}
    assert drawn | {"space_Digits_hierarchical.parquet"} <= set(first)
    attention = json.loads(first["attention.json"])
    assert attention["model"] == "gen2embed-mini"
    layer = attention["layers"]["0"].values()
    assert sum(one["efficiency"] * one["tokens"] for one in layer) == pytest.approx(
        attention["num_tokens"][0], abs=1e-3
    )
    for kind, words in commands.items():
        assert analyze(tmp_path / "out", kind, *words) == 0
    assert files_of(tmp_path / "out") == first
    # A picture of other figures does not stay beside the new ones.
    assert analyze(tmp_path / "out", "attention", "--text", "a", "--format", "svg") == 0
    assert not (tmp_path / "out" / "attention.png").exists()


def test_images_by_address_are_read_where_allowed(tmp_path: Path, capsys: Any) -> None:
    write_images(tmp_path / "MMEB" / "img")
    rows = colour_rows(["red", "green"])
    data = ("--data_dir", str(tmp_path / "MMEB"), "--subsets", "VOC2007", "--prompts", "hierarchical", "--limit", "2")
    table = tmp_path / "MMEB" / "VOC2007" / "test.parquet"
    write_table(table, rows)
    assert analyze(tmp_path / "local", "words", *data) == 0
    for name in ("red", "green"):
        image = (tmp_path / "MMEB" / "img" / f"{name}.png").read_bytes()
        fsspec.filesystem("memory").pipe(f"/photos/{name}.png", image)
    write_table(table, [row | {"qry_img_path": f"memory://photos/{Path(row['qry_img_path']).name}"} for row in rows])
    allowed = ("--remote_images", "memory://photos/")
    assert analyze(tmp_path / "remote", "words", *data, *allowed) == 0
    words = [json.loads((tmp_path / name / "words.json").read_text()) for name in ("local", "remote")]
    assert words[0]["inputs"] == words[1]["inputs"]
    capsys.readouterr()
    assert analyze(tmp_path / "refused", "words", *data, "--remote_images", "file") == 2
    assert "file" in capsys.readouterr().err


def test_attention_of_rows_of_a_dataset(data_dir: str, tmp_path: Path) -> None:
    mini = ("--benchmark", "mmeb-mini", "--data_dir", data_dir, "--subsets", "Digits", "--side", "document")
    assert analyze(tmp_path, "attention", *mini, "--limit", "2") == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    assert found["inputs"] == ["Digits 0", "Digits 1"]
    assert set(found["layers"]["0"]) == {"system", "user"}
    assert list(found["places"]) == ["system turn", "user turn, before the input", "user turn, behind the input"]


@pytest.mark.parametrize("prompt", ["none", "lens"])
def test_a_prompt_whose_words_cannot_be_moved_has_one_place(prompt: str, tmp_path: Path) -> None:
    """`lens` says something in the system turn, but a caller's system text would be read as its phrase."""
    assert analyze(tmp_path, "attention", "--text", "a red circle", "--prompt_mode", prompt) == 0
    assert "places" not in json.loads((tmp_path / "attention.json").read_text())


def test_a_file_of_others_is_refused_before_a_model_is_loaded(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "words.svg").write_text("mine")
    assert analyze(tmp_path, "words", "--text", "a", "--device", "no such device") == 2
    assert "words.svg was not written by gen2embed" in capsys.readouterr().err
    assert (tmp_path / "words.svg").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("attention", "--format", "parquet"), "--format parquet is for analyze space"),
        (("words", "--format", "gif"), "format gif is unknown; known: svg, png, parquet"),
        (("attention", "--image", "no.png"), "image 'no.png': not found"),
        (("attention", "--text", "a", "--subsets", "GQA"), "--subsets names inputs of datasets"),
        (("space", "--projection", "none"), "--data_dir is needed for --benchmark mmeb"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(words: Any, said: str, tmp_path: Path, capsys: Any) -> None:
    assert analyze(tmp_path, *words) == 2
    assert said in capsys.readouterr().err


def test_flags_are_listed_without_the_libraries_of_models() -> None:
    import subprocess
    import sys

    program = "import sys; from gen2embed_mteb.cli import build_parser; build_parser('analyze'); "
    program += "print([name for name in ('torch', 'transformers', 'sklearn', 'PIL.ImageFont') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
