"""MMEB's tasks in mteb against `gen2embed evaluate`: the same figures, the same rows set aside, the same images."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import mteb
import numpy as np
import pytest
from environments import Environment
from mmeb_files import M, colour_rows, eval_row, write_images, write_table
from mteb.models.abs_encoder import AbsEncoder
from PIL import Image

from gen2embed_mteb import cli
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.mini import benchmark, crepe
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb.tables import DataError

pytestmark = pytest.mark.slow

DATASETS = [dataset.name for dataset in MMEB_MINI.datasets]
SETS = ["swap_object", "swap_attribute", "replace_object", "replace_attribute", "replace_relation"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MMEB-mini: 8 rows a dataset, 8 records a set."""
    root = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_QUERIES", 8)
        patch.setattr(crepe, "NUM_RECORDS", 8)
        benchmark.ensure("eval", root)
        benchmark.ensure("crepe", root)
    return root


def evaluate(benchmark_name: str, data: Path, output: Path, *more: str) -> dict[str, Any]:
    """The content of `results.json` of `gen2embed evaluate`."""
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", benchmark_name, "--device", "cpu"]
    assert cli.main([*words, "--data_dir", str(data), "--output_dir", str(output), *more]) == 0
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluated(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate("mmeb-mini", mini, tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Gen2Embed as a user has it: the wheel, in an environment of its own, far from the checkout."""
    made = Environment(tmp_path_factory.mktemp("from_wheel"))
    made.install(str(wheel))
    return made


@pytest.fixture(scope="module")
def results(environment: Environment, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mteb run -m gen2embed -b MMEB-mini` wrote, through mteb's own console script."""
    output = tmp_path_factory.mktemp("results")
    words = ["run", "-m", "gen2embed", "-b", "MMEB-mini", "--output-folder", str(output)]
    environment.script(
        "mteb", *words, GEN2EMBED_MODEL="gen2embed-mini", MMEB_MINI_DIR=str(mini), CUDA_VISIBLE_DEVICES=""
    )
    return output


def scores_of(results: Path, task: str) -> dict[str, float]:
    (file,) = results.glob(f"results/Gen2Embed__gen2embed-mini/*/{task}.json")
    (scores,) = json.loads(file.read_text(encoding="utf-8"))["scores"]["test"]
    return scores


@pytest.mark.parametrize("name", DATASETS)
def test_console_script_from_a_wheel_scores_as_gen2embed_evaluate(
    name: str, results: Path, evaluated: dict[str, Any]
) -> None:
    scores, expected = scores_of(results, f"MMEB-mini-{name}"), evaluated["datasets"][name]
    assert scores["main_score"] == pytest.approx(expected["precision_at_1"], abs=1e-6)
    assert scores["mmeb_precision_at_1"] == scores["main_score"]
    assert scores["mmeb_precision_at_1_strict"] == pytest.approx(expected["precision_at_1_strict"], abs=1e-6)
    assert (scores["num_queries"], scores["num_errors"]) == (expected["num_queries"], 0) == (8, 0)
    assert scores["hit_rate_at_1"] <= scores["hit_rate_at_3"]  # mteb's own metrics are there as well


def test_nothing_came_from_the_checkout(results: Path, environment: Environment) -> None:
    (meta,) = results.glob("results/*/*/model_meta.json")
    source = json.loads(meta.read_text(encoding="utf-8"))["loader_kwargs"]["source"]
    assert Path(source).is_relative_to(environment.site)


def test_aggregates_are_the_averages_of_gen2embed_evaluate(results: Path, evaluated: dict[str, Any]) -> None:
    bench = mteb.get_benchmark("MMEB-mini")
    loaded = mteb.ResultCache(results).load_results(tasks=bench)
    (scores,) = bench.get_score(loaded).values()
    expected = {f"Meta-task::{task}": of["precision_at_1"] for task, of in evaluated["meta_tasks"].items()}
    expected |= {"Domain::IND": evaluated["ind"], "Domain::OOD": evaluated["ood"], "Mean(Task)": evaluated["overall"]}
    assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.exhaustive
def test_gen2embed_mteb_runs_with_the_start_up_hook_off(environment: Environment, mini: Path, tmp_path: Path) -> None:
    words = ["mteb", "run", "-m", "gen2embed-mini", "-t", "MMEB-mini-Digits", "--output-folder", str(tmp_path)]
    words += ["--overwrite-strategy", "always", "-v", "0"]
    off = {"GEN2EMBED_NO_HOOK": "1", "MMEB_MINI_DIR": str(mini), "CUDA_VISIBLE_DEVICES": ""}
    environment.script("gen2embed", *words, **off)
    assert scores_of(tmp_path, "MMEB-mini-Digits")["num_queries"] == 8
    stock = "import mteb; print('gen2embed' in mteb.models.model_implementations.MODEL_REGISTRY)"
    assert environment.run(stock, **off).stdout.split() == ["False"]


@pytest.fixture(scope="module")
def encoder() -> Any:
    datasets.disable_progress_bars()
    return mteb.get_model("gen2embed-mini", device="cpu")


def run(model: Any, task: Any) -> dict[str, float]:
    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    (scores,) = result.scores["test"]
    return scores


def test_sugarcrepe_plus_plus_scores_as_gen2embed_evaluate(
    encoder: Any, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEB_MINI_DIR", str(mini))
    expected = evaluate("sugarcrepe++-mini", mini, tmp_path)["datasets"]
    task = mteb.get_task("SugarCrepe++-mini")
    (result,) = mteb.evaluate(
        encoder, task, cache=None, show_progress_bar=False, prediction_folder=tmp_path
    ).task_results
    predictions = json.loads((tmp_path / task.prediction_file_name).read_text(encoding="utf-8"))
    assert len(predictions["swap_object"]["test"]["itt"]) == 8
    found = {scores["hf_subset"]: scores for scores in result.scores["test"]}
    assert sorted(found) == sorted(SETS)
    for name in SETS:
        for figure in ("accuracy_itt", "accuracy_tot", "num_queries", "num_errors"):
            assert found[name][figure] == pytest.approx(expected[name][figure], abs=1e-6)
        assert found[name]["main_score"] == found[name]["accuracy_itt"]


@pytest.fixture
def eval_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for MMEB's tables, with the images that `colour_rows` names, told to mteb's tasks."""
    folder = tmp_path / "MMEB-eval"
    write_images(folder / "img")
    monkeypatch.setenv("MMEB_EVAL_DIR", str(folder))
    monkeypatch.delenv("MMEB_IMAGE_DIR", raising=False)
    return folder


INSTRUCTION = f"{M} Represent the given image.\n"


def compare_rows(positives: list[str], others: list[str]) -> list[dict[str, Any]]:
    """Image-to-image rows: a red picture, and candidates by file name."""
    return [
        eval_row(f"{M}\nFind the same\n", "img/red.png", [(INSTRUCTION, name) for name in [positive, *others]])
        for positive in positives
    ]


def test_ties_count_for_the_model_by_position_and_not_by_the_strict_figure(
    encoder: Any, eval_dir: Path, tmp_path: Path
) -> None:
    """Four rows: a copy of the positive under another name ties with it, in whatever order mteb's ids are."""
    for name in ("a_copy", "z_copy"):
        (eval_dir / "img" / f"{name}.png").write_bytes((eval_dir / "img" / "red.png").read_bytes())
    rows = compare_rows(["img/red.png"], ["img/blue.png"])  # right
    rows += compare_rows(["img/red.png"], ["img/a_copy.png", "img/red.png"])  # tied; a repeated positive is no rival
    rows += compare_rows(["img/z_copy.png"], ["img/red.png", "img/blue.png"])  # tied
    rows += compare_rows(["img/blue.png"], ["img/red.png"])  # wrong
    write_table(eval_dir / "CIRR" / "test-00000-of-00001.parquet", rows)
    scores = run(encoder, mteb.get_task("MMEB-CIRR"))
    assert (scores["mmeb_precision_at_1"], scores["mmeb_precision_at_1_strict"]) == (0.75, 0.25)
    expected = evaluate("mmeb", eval_dir, tmp_path / "out", "--subsets", "CIRR")["datasets"]["CIRR"]
    assert (expected["precision_at_1"], expected["precision_at_1_strict"]) == (0.75, 0.25)


class Collapsed(AbsEncoder):
    """A model of mteb's that is not ours, and knows one vector."""

    mteb_model_meta = mteb.get_model_meta("gen2embed-mini").model_copy(update={"loader": None})

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        return np.ones((len(inputs.dataset), 3), np.float32)


def test_a_collapsed_model_of_anyones_is_found_out_by_the_strict_figure(eval_dir: Path) -> None:
    write_table(eval_dir / "VOC2007" / "test-00000-of-00001.parquet", colour_rows(["red", "green", "blue"]))
    scores = run(Collapsed(), mteb.get_task("MMEB-VOC2007"))
    assert (scores["mmeb_precision_at_1"], scores["mmeb_precision_at_1_strict"]) == (1.0, 0.0)
    assert scores["num_queries"] == 3


def test_unusable_rows_are_set_aside_as_by_gen2embed_evaluate(
    encoder: Any, eval_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One row in 1,200 names an image outside of the folder: under 0.1 %, so that the rest counts."""
    rows = colour_rows(["red", "green", "blue"]) * 400
    Image.new("RGB", (32, 32)).save(tmp_path / "outside.png")
    rows[7] = {**rows[7], "qry_img_path": "../outside.png"}
    table = eval_dir / "VOC2007" / "test-00000-of-00001.parquet"
    write_table(table, rows)
    scores = run(encoder, mteb.get_task("MMEB-VOC2007"))
    expected = evaluate("mmeb", eval_dir, tmp_path / "out", "--subsets", "VOC2007")["datasets"]["VOC2007"]
    assert (scores["num_queries"], scores["num_errors"]) == (1199, 1)
    assert (expected["num_queries"], expected["num_errors"]) == (1199, 1)
    assert scores["main_score"] == pytest.approx(expected["precision_at_1"], abs=1e-6)
    assert "row 7 was set aside: image '../outside.png': leads outside" in caplog.text

    write_table(table, rows[:30])  # more than 0.1 %
    with pytest.raises(DataError, match=r"1 of 30 rows cannot be used.*gen2embed evaluate --max_error_rate"):
        mteb.get_task("MMEB-VOC2007").load_data()


def test_images_come_from_a_zip_archive_and_are_not_rotated(eval_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image columns of mteb's kind would turn a picture as its EXIF says; VLM2Vec and Gen2Embed do not."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (60, 40), "red").save(eval_dir / "img" / "turned.jpg", exif=exif)
    archive = eval_dir.parent / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((eval_dir / "img").iterdir()):
            file.write(path, f"img/{path.name}")
            path.unlink()
    monkeypatch.setenv("MMEB_IMAGE_DIR", str(archive))
    write_table(eval_dir / "CIRR" / "test-00000-of-00001.parquet", compare_rows(["img/turned.jpg"], ["img/blue.png"]))
    task = mteb.get_task("MMEB-CIRR")
    task.load_data()
    split = task.dataset["default"]["test"]
    assert split["corpus"][0]["image"].size == (60, 40)
    assert split["top_ranked"] == {"q0": ["d0", "d1"]}
    assert split["relevant_docs"] == {"q0": {"d0": 1}}


def test_texts_reach_the_model_as_they_are_and_candidates_of_refcoco_matching_as_queries(
    encoder: Any, eval_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    prepare = PrefixEncoder.prepare

    def recording(self: PrefixEncoder, side: Any, inputs: list[dict[str, Any]]) -> Any:
        seen.update((side, sample["text"]) for sample in inputs)
        return prepare(self, side, inputs)

    monkeypatch.setattr(PrefixEncoder, "prepare", recording)
    for name in ("CIRR", "RefCOCO-Matching"):
        write_table(eval_dir / name / "test-00000-of-00001.parquet", compare_rows(["img/red.png"], ["img/blue.png"]))
    run(encoder, mteb.get_task("MMEB-CIRR"))
    assert seen == {("query", f"{M}\nFind the same\n"), ("document", INSTRUCTION)}
    seen.clear()
    run(encoder, mteb.get_task("MMEB-RefCOCO-Matching"))
    assert seen == {("query", f"{M}\nFind the same\n"), ("query", INSTRUCTION)}


def test_without_a_folder_the_pinned_state_of_the_hub_is_read(
    eval_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub, served from files in its layout; what is asked of it is asserted."""
    table = write_table(tmp_path / "hub" / "test.parquet", colour_rows(["red", "green"]))
    archive = tmp_path / "hub" / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (eval_dir / "img").iterdir():
            file.write(path, f"img/{path.name}")
    asked = []
    real = datasets.load_dataset

    def load_dataset(hub_id: str, name: str, split: str, revision: str) -> Any:
        asked.append((hub_id, name, split, revision))
        return real("parquet", data_files={split: str(table)}, split=split, cache_dir=str(tmp_path / "cache"))

    def hf_hub_download(hub_id: str, filename: str, repo_type: str, revision: str) -> str:
        asked.append((hub_id, filename, repo_type, revision))
        return str(archive)

    monkeypatch.delenv("MMEB_EVAL_DIR")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    task = mteb.get_task("MMEB-VOC2007")
    task.load_data()
    assert len(task.dataset["default"]["test"]["queries"]) == 2
    revision = task.metadata.dataset["revision"]
    assert revision == "2f069730be515ea60778413777816b53e2d2a697"
    hub_id = "TIGER-Lab/MMEB-eval"
    assert asked == [(hub_id, "images.zip", "dataset", revision), (hub_id, "VOC2007", "test", revision)]


def test_missing_data_says_which_variable_to_set(eval_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = mteb.get_task("MMEB-GQA")
    with pytest.raises(DataError, match=r"no parquet file of GQA.*MMEB_EVAL_DIR"):
        task.load_data()
    monkeypatch.setenv("MMEB_EVAL_DIR", os.fspath(eval_dir / "nowhere"))
    with pytest.raises(DataError, match=r"MMEB_EVAL_DIR=.*nowhere is no folder"):
        task.load_data()
    monkeypatch.setenv("MMEB_EVAL_DIR", str(eval_dir))
    monkeypatch.setenv("MMEB_IMAGE_DIR", "/nowhere")
    with pytest.raises(DataError, match=r"MMEB_IMAGE_DIR"):
        task.load_data()
    monkeypatch.delenv("SUGARCREPE_IMAGE_DIR", raising=False)
    with pytest.raises(DataError, match=r"SUGARCREPE_IMAGE_DIR"):
        mteb.get_task("SugarCrepe++").load_data()
