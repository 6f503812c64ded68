"""The code in contrib/mteb/README.md is code: it runs in mteb, and scores as ours does."""

import re
import zipfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import mteb
import pytest
from environments import ROOT
from mmeb_files import colour_rows, write_images, write_table
from mteb.benchmarks.benchmark import Benchmark, BenchmarkAggregation, CustomGroup, CustomGrouping

from gen2embed_mteb.mmeb.datasets import META_TASKS

MODEL, TASK, BENCHMARK = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "contrib" / "mteb" / "README.md").read_text(encoding="utf-8"), re.M | re.S
)


def namespace_of(code: str, **given: Any) -> dict[str, Any]:
    namespace = {"__name__": "contribution", **given}
    exec(compile(code, "contrib/mteb/README.md", "exec"), namespace)
    return namespace


def test_the_model_is_the_one_that_is_registered() -> None:
    meta, ours = namespace_of(MODEL)["gen2embed_qwen2_vl_2b"], mteb.get_model_meta("Gen2Embed/Qwen2-VL-2B-Instruct")
    differing = {
        field
        for field in type(meta).model_fields
        if field not in ("loader", "revision") and getattr(meta, field) != getattr(ours, field)
    }
    assert differing == {"extra_requirements_groups"}
    assert ours.revision.startswith(meta.revision)


def test_the_task_scores_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on the same rows and images, for its task as the hub would serve them."""
    rows = colour_rows(["red", "green", "blue", "white", "black"])
    rows[0]["qry_img_path"], rows[1]["qry_img_path"] = rows[1]["qry_img_path"], rows[0]["qry_img_path"]  # two are wrong
    table = write_table(tmp_path / "MMEB-eval" / "VOC2007" / "test-00000-of-00001.parquet", rows)
    write_images(tmp_path / "MMEB-eval" / "img")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in (tmp_path / "MMEB-eval" / "img").iterdir():
            archive.write(path, f"img/{path.name}")
    monkeypatch.setenv("MMEB_EVAL_DIR", str(tmp_path / "MMEB-eval"))
    monkeypatch.delenv("MMEB_IMAGE_DIR", raising=False)
    real = datasets.load_dataset

    def load_dataset(hub_id: str, name: str, split: str, revision: str) -> Any:
        assert (hub_id, name, revision[:7]) == ("TIGER-Lab/MMEB-eval", "VOC2007", "2f06973")
        return real("parquet", data_files={split: str(table)}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "images.zip"))
    encoder = mteb.get_model("gen2embed-mini", device="cpu")
    theirs = namespace_of(TASK)["MMEBVOC2007"]()
    assert theirs.metadata.is_filled()
    scores = []
    for task in (theirs, mteb.get_task("MMEB-VOC2007")):
        (result,) = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results
        scores.append(result.scores["test"][0])
    for figure in ("main_score", "mmeb_precision_at_1", "mmeb_precision_at_1_strict"):
        assert scores[0][figure] == pytest.approx(scores[1][figure], abs=1e-6)
    assert 0 < scores[0]["main_score"] < 1  # figures that could differ


def test_the_benchmark_is_the_one_that_is_registered() -> None:
    ours = mteb.get_benchmark("MMEB")
    given = {
        "META_TASKS": {name: [task for task in ours.tasks if task.info.meta_task == name] for name in META_TASKS},
        "IN_DOMAIN": [task for task in ours.tasks if task.info.in_domain],
        "OUT_OF_DOMAIN": [task for task in ours.tasks if not task.info.in_domain],
        "MMEB_CITATION": ours.citation,
    }
    names = (Benchmark, BenchmarkAggregation, CustomGroup, CustomGrouping)
    theirs = namespace_of(BENCHMARK, **given, **{cls.__name__: cls for cls in names})["MMEB"]
    for field in ("name", "tasks", "description", "reference", "citation"):
        assert list(getattr(theirs, field)) == list(getattr(ours, field))
    for found, expected in zip(theirs.aggregations[1:], ours.aggregations[1:], strict=True):
        assert (found.name, found.task_to_label) == (expected.name, expected.task_to_label)
