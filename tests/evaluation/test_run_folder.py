"""The output folder of an evaluation: what its reports were made of, and that those of two runs are never mixed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmeb_files import COLOURS, colour_rows, write_images, write_table
from plain_encoder import PlainEncoder

from gen2embed_mteb import cli
from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.evaluation.run_folder import check_reports
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.sugarcrepe.evaluate import SUGARCREPE_BENCHMARK, evaluate_captions
from vlm2vec_adapter.results import report

NAMES = list(COLOURS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """VOC2007 with all colours, GQA with one row, and a copy of both beside."""
    for folder in ("data", "copy"):
        write_images(tmp_path / folder / "img")
        for name, rows in (("VOC2007", colour_rows(NAMES)), ("GQA", colour_rows(NAMES[:1]))):
            write_table(tmp_path / folder / name / "test-00000-of-00001.parquet", rows)
            write_table(tmp_path / folder / name / "val-00000-of-00001.parquet", rows)
    return tmp_path / "data"


def run(data: Path, output: Path, *subsets: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"data_dir": str(data), "output_dir": str(output), "fingerprint": "plain"}
    evaluate(PlainEncoder(), MMEB, EvaluationConfig(**{**values, "subsets": subsets or ("VOC2007", "GQA"), **changes}))
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    return content


def test_results_say_what_they_are_of(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(data, out, "VOC2007", limit=3, image_dir=str(data), meta_tasks=("Classification",))
    expected = {"data_dir": str(data), "image_dir": str(data), "split": "test", "limit": 3}
    expected |= {"subsets": ["VOC2007"], "meta_tasks": ["Classification"], "resize": "processor", "min_side": 28}
    assert {name: found["settings"][name] for name in expected} == expected
    assert found["settings"].keys() == {*expected, "follow_links", "max_text_chars", "max_candidates", "max_row_bytes"}
    assert found["benchmark"] == "mmeb"
    assert "Only the first 3 rows of each dataset." in (out / "results.md").read_text()
    whole = run(data, tmp_path / "whole")["settings"]
    assert (whole["limit"], whole["image_dir"], whole["meta_tasks"]) == (None, "", [])
    assert "Only the first" not in (tmp_path / "whole" / "results.md").read_text()


def test_a_run_on_turned_images_is_another_run(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", "VOC2007")
    turned = EvaluationConfig(
        data_dir=str(data), output_dir=str(tmp_path / "out"), fingerprint="plain", exif_orientation=True
    )
    with pytest.raises(StoreMismatchError, match="exif_orientation"):
        check_reports(turned, "mmeb", ["VOC2007"])
    found = run(data, tmp_path / "turned", "VOC2007", exif_orientation=True)
    assert found["settings"]["exif_orientation"] is True
    lying = EvaluationConfig(data_dir=str(data), output_dir=str(tmp_path / "turned"), fingerprint="plain")
    with pytest.raises(StoreMismatchError, match="exif_orientation is True there and None now"):
        check_reports(lying, "mmeb", ["VOC2007"])


def test_names_that_no_encoding_has_are_written(data: Path, tmp_path: Path) -> None:
    """A folder whose name is not UTF-8 on disk comes with lone surrogates; the run must not fail at its end."""
    odd = (tmp_path / "copy").rename(tmp_path / os.fsdecode(b"d\xff"))
    for _ in range(2):
        found = run(data, tmp_path / "out", model_name=str(odd / "model"), image_dir=str(odd))
        assert found["settings"]["image_dir"] == str(odd)
    assert "\\udcff" in (tmp_path / "out" / "results.md").read_text()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


CHANGES: dict[str, dict[str, Any]] = {
    "limit": {"limit": 1},
    "split": {"split": "val"},
    "data_dir": {"data_dir": "copy"},
    "image_dir": {"image_dir": "copy"},
    "max_candidates": {"max_candidates": 7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_with_other_rows_is_refused_and_its_figures_are_never_beside(
    data: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    run(data, out)
    before = files_of(out)
    with pytest.raises(StoreMismatchError, match=rf"{name} is .* there and .* now.*--overwrite"):
        run(data, out, "GQA", **CHANGES[name])
    assert files_of(out) == before
    # Asked to replace them, it leaves nothing of the other run for an average.
    found = run(data, out, "GQA", **CHANGES[name], overwrite=True)
    assert list(found["datasets"]) == ["GQA"]
    assert sorted(path.name for path in out.glob("*_score.json")) == ["GQA_score.json"]
    assert report.read_run(out).figures == {"GQA": 1.0}


def test_another_model_is_refused_when_the_vectors_are_gone_too(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    (tmp_path / "out" / "embeddings").rename(tmp_path / "kept")
    with pytest.raises(StoreMismatchError, match="fingerprint is 'plain' there and 'other' now"):
        run(data, tmp_path / "out", fingerprint="other")


def test_datasets_one_after_the_other_fit_together(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows and model, however the folder is spelled: a folder of both is what one run would have left."""
    monkeypatch.chdir(tmp_path)
    run(data, tmp_path / "out", "VOC2007")
    found = run(Path("copy/../data"), tmp_path / "out", "GQA", meta_tasks=("VQA",))
    assert list(found["datasets"]) == ["GQA"]
    run(data, tmp_path / "whole")
    assert report.read_run(tmp_path / "out").figures == report.read_run(tmp_path / "whole").figures
    run(data, tmp_path / "out")


def test_two_benchmarks_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    records = {"0": {"filename": "img/red.png", "caption": "red", "negative_caption": "blue"}}
    (data / "swap_obj.json").write_text(json.dumps(records))
    run(data, tmp_path / "out")
    config = EvaluationConfig(
        data_dir=str(data), output_dir=str(tmp_path / "out"), fingerprint="plain", subsets=("swap_obj",), limit=1
    )
    with pytest.raises(StoreMismatchError, match="benchmark is 'mmeb' there and 'sugarcrepe' now"):
        evaluate_captions(PlainEncoder(), SUGARCREPE_BENCHMARK, config)
    evaluate_captions(PlainEncoder(), SUGARCREPE_BENCHMARK, EvaluationConfig(**{**vars(config), "overwrite": True}))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["benchmark"], found["settings"]["limit"], found["settings"]["subsets"]) == (
        "sugarcrepe",
        1,
        ["swap_obj"],
    )
    assert "Only the first 1 records" in (tmp_path / "out" / "results.md").read_text()
    assert not list((tmp_path / "out").glob("*_score.json"))
    assert not (tmp_path / "out" / "leaderboard.json").exists()


FOREIGN: dict[str, Callable[[Path], object]] = {
    "results.json": lambda path: path.write_text('{"overall": 1.0}'),
    "results.md": lambda path: path.write_text("my notes"),
    "errors.jsonl": lambda path: path.mkdir(),
    "leaderboard.json": lambda path: path.symlink_to("/etc/hostname"),
    "VOC2007_score.json": lambda path: path.write_text('{"acc": 0.5, "num_correct": 1, "num_pred": 2}'),
    "SUN397_score.json": lambda path: path.write_text('{"acc": 0.5}'),  # not of this run, but it would be averaged
    "embeddings/manifest.json": lambda path: (path.parent.mkdir(), path.write_text('{"name": "web app"}')),
}


def state_of(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """What is in a folder, with everything that writing changes, but not when it was last read."""
    found = [(path, os.lstat(path)) for path in sorted(folder.rglob("*"))]
    return [(str(path), one.st_mode, one.st_ino, one.st_size, one.st_mtime_ns) for path, one in found]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_before_anything_is_encoded(
    data: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    FOREIGN[name](out / name)
    before = state_of(out)
    encoder = PlainEncoder()
    config = EvaluationConfig(
        data_dir=str(data), output_dir=str(out), fingerprint="plain", subsets=("VOC2007",), overwrite=overwrite
    )
    with pytest.raises(ForeignFileError, match=Path(name).name):
        evaluate(encoder, MMEB, config)
    assert not encoder.given
    assert state_of(out) == before


def test_a_report_with_notes_in_it_is_the_users(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    notes = (tmp_path / "out" / "results.md").read_text() + "\nmine\n"
    (tmp_path / "out" / "results.md").write_text(notes)
    with pytest.raises(ForeignFileError, match="was changed since"):
        run(data, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "results.md").read_text() == notes


@pytest.mark.parametrize("benchmark", ["mmeb", "mmeb-mini", "sugarcrepe"])
def test_the_command_line_checks_the_folder_before_it_loads_a_model(
    data: Path, tmp_path: Path, benchmark: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.md").write_text("mine")
    monkeypatch.setattr("gen2embed_mteb.mini.benchmark.ensure", lambda part, root: Path(root))
    words = ["evaluate", "--model_name", str(tmp_path / "no model"), "--data_dir", str(data), "--overwrite"]
    assert cli.main([*words, "--benchmark", benchmark, "--output_dir", str(tmp_path)]) == 2
    assert "results.md was not written by gen2embed" in capsys.readouterr().err
    assert not (tmp_path / "embeddings").exists()


@pytest.mark.parametrize("name", ["report.html", "training.log", "none/results.json", "tuned/results.json"])
def test_the_demo_checks_its_folder_before_it_begins(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert cli.main(["demo", "--data_dir", str(tmp_path / "mini"), "--output_dir", str(tmp_path)]) == 2
    assert Path(name).name in capsys.readouterr().err
    assert not (tmp_path / "mini").exists()
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("writes", [1, 4, 7, 10])
@pytest.mark.slow
def test_killed_while_reports_are_replaced_nothing_is_mixed(data: Path, tmp_path: Path, writes: int) -> None:
    """Whatever is left is refused by `report`, or of one run; the next run ends as if there had been none."""
    out = tmp_path / "out"
    run(data, out)
    code = f"""
import os, pathlib, sys
sys.path[:0] = [{str(Path(__file__).parents[1] / "helpers")!r}, {str(Path(__file__).parent)!r}]
from gen2embed_mteb.storage.owned_folder import OwnedFolder
left = {writes}
def dying(stock):
    def call(*args):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return stock(*args)
    return call
OwnedFolder.write, OwnedFolder.remove = dying(OwnedFolder.write), dying(OwnedFolder.remove)
from pathlib import Path
import test_run_folder
test_run_folder.run(Path({str(data)!r}), Path({str(out)!r}), "GQA", limit=1, overwrite=True)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", code], check=False, env=environment)
    assert killed.returncode == 9
    if any(out.glob("*_score.json")):
        with pytest.raises(ForeignFileError, match="killed while it wrote"):
            report.read_run(out)
    found = run(data, out, "VOC2007", limit=2)
    assert found["settings"]["limit"] == 2
    assert list(report.read_run(out).figures) == ["VOC2007"]


def test_report_says_the_limit_and_refuses_what_is_not_of_the_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(data, out, limit=1)
    assert "only the first 1 rows of each dataset" in report.write([out], {})
    assert "only the first 1 rows of each dataset" in (out / "report.md").read_text()
    run(data, out, limit=1)  # what `report` wrote is no obstacle
    (out / "SUN397_score.json").write_text('{"acc": 1.0, "num_correct": 9, "num_pred": 9}')
    with pytest.raises(ForeignFileError, match=r"SUN397_score\.json.*move it away"):
        report.write([out], {})
