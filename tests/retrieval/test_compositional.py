"""SugarCrepe as a part of `diverse`: the figures of a run of its own, and what is refused or left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mmeb_files import write_images
from plain_encoder import PlainEncoder

from gen2embed_mteb.benchmarks import open_benchmark
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.retrieval.evaluate import chosen, evaluate_retrieval, text_table
from gen2embed_mteb.retrieval.report import markdown
from gen2embed_mteb.sugarcrepe.evaluate import evaluate_captions
from gen2embed_mteb.sugarcrepe.scoring import SUGARCREPE_BENCHMARK
from gen2embed_mteb.table_command.plans import Run
from gen2embed_mteb.table_command.records import finished_evaluation, result_figures, set_aside

COLOURS = ("red", "green", "blue")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Urban1K of three pictures, and SugarCrepe's seven sets, each of three records and one whose image is missing."""
    root = tmp_path / "data"
    for part in ("sugarcrepe/data", "Urban1k/caption", "Urban1k/image"):
        (root / part).mkdir(parents=True)
    pictures = root / "sugarcrepe" / "val2017"
    write_images(pictures)
    for number, name in enumerate(COLOURS):
        shutil.copy(pictures / f"{name}.png", root / "Urban1k" / "image" / f"{number}.png")
        (root / "Urban1k" / "caption" / f"{number}.txt").write_text(f"A {name} street.\n")
    for number, name in enumerate(SUGARCREPE_BENCHMARK.sets):
        records = {
            str(index): {
                "filename": f"{colour}.png",
                "caption": f"a {colour} thing of {name}",
                "negative_caption": f"a thing {number} that is not {colour}"
                if index
                else f"thing a {colour} of {name}",
            }
            for index, colour in enumerate(COLOURS)
        }
        records["3"] = {"filename": "gone.png", "caption": "a gone thing", "negative_caption": "nothing"}
        (root / "sugarcrepe" / "data" / f"{name}.json").write_text(json.dumps(records))
    return root


def settings(data: Path, output: Path, **changes: Any) -> EvaluationConfig:
    shared = {"data_dir": str(data), "output_dir": str(output), "fingerprint": "plain", "max_error_rate": 1.0}
    return EvaluationConfig(**{**shared, **changes})


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    content.pop("seconds")
    return content


def test_its_part_is_a_run_of_its_own(data: Path, tmp_path: Path) -> None:
    alone = settings(
        data / "sugarcrepe",
        tmp_path / "alone",
        image_dir=str(data / "sugarcrepe" / "val2017"),
        plain_captions=True,
    )
    evaluate_captions(PlainEncoder(), SUGARCREPE_BENCHMARK, alone)
    config, encoder = settings(data, tmp_path / "out"), PlainEncoder()
    result = evaluate_retrieval(encoder, "diverse", config)
    assert [one[1] for one in encoder.given if one[0] == "query" and one[1].startswith("Find me")] == []
    found, own = results(tmp_path / "out"), results(tmp_path / "alone")
    assert found["sugarcrepe"] == {"datasets": own["datasets"], "groups": own["groups"]}
    assert list(found["sugarcrepe"]["datasets"]) == list(SUGARCREPE_BENCHMARK.sets)
    assert set(found["datasets"]) == {"urban1k"}
    by_hand = sum(own["datasets"][name]["accuracy_itt"] for name in ("swap_obj", "swap_att")) / 2
    assert found["sugarcrepe"]["groups"]["Swap"] == pytest.approx(by_hand)
    assert result.num_scored == 3 + 7 * 3
    listed = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [(one["dataset"], one["row"]) for one in listed] == [(name, 3) for name in SUGARCREPE_BENCHMARK.sets]
    for text in (markdown(result, config), text_table(result, config)):
        assert "SugarCrepe: 21 records scored, 7 set aside" in text and "3 images scored, 0 set aside" in text
        assert "UniME stage 1+2 (Phi3.5-V)" in text and "93.3" in text
    figures = result_figures(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert figures["sugarcrepe.swap"] == pytest.approx(100 * by_hand) and "urban1k.t2i" in figures
    assert set_aside(results(tmp_path / "out")) == (7, 31)


def test_a_second_run_encodes_nothing_and_writes_the_same(data: Path, tmp_path: Path) -> None:
    evaluate_retrieval(PlainEncoder(), "diverse", settings(data, tmp_path / "out"))
    written, again = results(tmp_path / "out"), PlainEncoder()
    evaluate_retrieval(again, "diverse", settings(data, tmp_path / "out"))
    assert not again.given and results(tmp_path / "out") == written


def test_it_is_chosen_by_name(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "out", subsets=("SugarCrepe",))
    assert chosen("diverse", config) == []
    result = evaluate_retrieval(PlainEncoder(), "diverse", config)
    assert result.captions is not None and not result.scores
    assert "| dataset |" not in markdown(result, config)
    only = evaluate_retrieval(PlainEncoder(), "diverse", settings(data, tmp_path / "urban", subsets=("urban1k",)))
    assert only.captions is None and len(only.scores) == 1
    with pytest.raises(Gen2EmbedError, match="unknown dataset 'sugarcrepe'"):
        chosen("diverse-mini", settings(data, tmp_path / "mini", subsets=("sugarcrepe",)))


def test_a_folder_with_nothing_else(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "Urban1k")
    assert evaluate_retrieval(PlainEncoder(), "diverse", settings(data, tmp_path / "out")).captions is not None
    shutil.rmtree(data / "sugarcrepe")
    with pytest.raises(DataError, match="no dataset"):
        chosen("diverse", settings(data, tmp_path / "out"))
    with pytest.raises(DataError, match="no sugarcrepe; put its JSON files into a folder of this name"):
        chosen("diverse", settings(data, tmp_path / "out", subsets=("sugarcrepe",)))


def test_another_score_leaves_it_out_and_says_so(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "out", scoring="csls")
    result = evaluate_retrieval(PlainEncoder(), "diverse", config)
    assert result.captions is None and "SugarCrepe was left out" in markdown(result, config)
    with pytest.raises(Gen2EmbedError, match="leave --calibration and --scoring out"):
        chosen("diverse", settings(data, tmp_path / "out", scoring="csls", subsets=("sugarcrepe",)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "data" / "swap_obj.json").unlink(), "no swap_obj.json"),
        (lambda root: (root / "data" / "swap_obj.json").write_text("["), "not readable as JSON"),
        (lambda root: shutil.rmtree(root / "val2017"), "is there without its images; put COCO's val2017"),
        (lambda root: (shutil.rmtree(root / "val2017"), (root / "val2017.zip").write_text("x")), "not a zip archive"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_encoded(data: Path, tmp_path: Path, spoil: Any, said: str) -> None:
    spoil(data / "sugarcrepe")
    encoder = PlainEncoder()
    with pytest.raises((DataError, FileNotFoundError), match=said):
        evaluate_retrieval(encoder, "diverse", settings(data, tmp_path / "out"))
    assert not encoder.given and not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("place", ["beside", "image_dir", "itself"])
def test_where_its_images_may_be(data: Path, tmp_path: Path, place: str) -> None:
    images = data / "sugarcrepe" / "val2017"
    target = {"beside": data, "image_dir": tmp_path / "else", "itself": tmp_path / "else"}[place] / "val2017"
    target.parent.mkdir(exist_ok=True)
    images.rename(target)
    given = {"beside": "", "image_dir": str(target.parent), "itself": str(target)}[place]
    result = evaluate_retrieval(PlainEncoder(), "diverse", settings(data, tmp_path / "out", image_dir=given))
    assert result.captions is not None and result.captions.num_scored == 21


def test_the_command_line_checks_it_before_a_model_is_loaded(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "sugarcrepe" / "val2017")
    _, check, _, _ = open_benchmark("diverse", str(data), "")
    with pytest.raises(DataError, match="without its images"):
        check(settings(data, tmp_path / "out"))


def test_a_table_is_not_finished_when_sugarcrepe_was_added_since(data: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--benchmark", "diverse", "--model_name", "m", "--prompt_mode", "hierarchical")
    run = Run(tmp_path / "out", (*words, "--data_dir", str(data), "--output_dir", str(tmp_path / "out")))
    config = settings(data, tmp_path / "out", max_error_rate=1.0)
    (data / "sugarcrepe").rename(tmp_path / "kept")
    evaluate_retrieval(PlainEncoder(), "diverse", config)
    before = finished_evaluation(run)
    assert before is not None and "sugarcrepe" not in before
    (tmp_path / "kept").rename(data / "sugarcrepe")
    assert finished_evaluation(run) is None
    evaluate_retrieval(PlainEncoder(), "diverse", config)
    after = finished_evaluation(run)
    assert after is not None and set(after["sugarcrepe"]["groups"]) == {"Replace", "Swap", "Add"}
