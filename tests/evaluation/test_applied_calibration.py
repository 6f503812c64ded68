"""A calibrated folder applied to another model: the same as evaluating the folder itself, or a clear refusal."""

from pathlib import Path
from typing import Any

import pytest

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.config import ComparisonOptions, EvaluationConfig
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.applied_calibration import comparison_settings, refuse_comparison, require_fitting
from gen2embed_mteb.evaluation.method import facts_of, method_of
from gen2embed_mteb.evaluation.run_folder import _differences, run_settings
from gen2embed_mteb.storage.owned_folder import OwnedFolder

TEXTS = [f"{color} {shape} number {n}" for n in range(6) for color in ("red", "blue", "green") for shape in "abc"]


@pytest.fixture(scope="module")
def folder(tiny_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode="system")
    model.calibrate(TEXTS, TEXTS, data="letters")
    path = tmp_path_factory.mktemp("calibrated") / "model"
    model.save_pretrained(str(path))
    return path


def asked(folder: Path | str) -> ComparisonOptions:
    return ComparisonOptions(calibration=str(folder))


def test_a_model_with_the_same_prompt_fits(tiny: Any, folder: Path) -> None:
    require_fitting(tiny("qwen2_vl", prompt_mode="system"), asked(folder))
    require_fitting(tiny("qwen2_vl"), asked("own"))
    require_fitting(tiny("qwen2_vl"), asked(""))


def test_another_prompt_is_refused(tiny: Any, folder: Path) -> None:
    with pytest.raises(Gen2EmbedError, match="with the prompt system, the model has hierarchical; pass --prompt_mode"):
        require_fitting(tiny("qwen2_vl"), asked(folder))


def test_another_readout_is_refused(tiny: Any, folder: Path) -> None:
    model = tiny("qwen2_vl", prompt_mode="system", readout="pre-mlp")
    with pytest.raises(Gen2EmbedError, match="readout=last, readout_norm=True, the model has readout=pre-mlp"):
        require_fitting(model, asked(folder))


def test_another_width_is_refused(tiny_dir: Any, folder: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode="system", truncate_dim=16)
    with pytest.raises(Gen2EmbedError, match="maps vectors of 32 dimensions, the model's have 16"):
        require_fitting(model, asked(folder))


def test_a_model_with_a_calibration_of_its_own_is_refused(folder: Path) -> None:
    model = Gen2Embed(folder, device="cpu")
    for calibration in (str(folder), "own"):
        with pytest.raises(Gen2EmbedError, match=r"has a calibration of its own.*would be put behind it"):
            require_fitting(model, asked(calibration))
    require_fitting(model, asked(""))


def test_the_reports_of_a_calibrated_model_say_on_how_many_inputs(folder: Path, tiny: Any, tmp_path: Path) -> None:
    plain = {"data_dir": "data", "output_dir": str(tmp_path), "fingerprint": "f"}
    itself = EvaluationConfig(**plain, **facts_of(Gen2Embed(folder, device="cpu"), "some/model"))
    applied = EvaluationConfig(**plain, calibration=str(folder), **facts_of(tiny("qwen2_vl"), "some/model"))
    for config in (itself, applied):
        assert method_of(config).cells() == ["model", "1", "108 letters", "no", "0"]


def test_a_folder_that_was_calibrated_anew_is_another_run(tiny_dir: Any, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    found = []
    for shrinkage in (0.9, 0.5):
        model.calibrate(TEXTS, TEXTS, shrinkage=shrinkage)
        model.save_pretrained(str(tmp_path / "model"))
        found.append(comparison_settings(asked(tmp_path / "model")))
    assert [settings["calibration"] for settings in found] == [str(tmp_path / "model")] * 2
    assert found[0]["calibration_digest"] != found[1]["calibration_digest"]
    config = EvaluationConfig(
        data_dir="data", output_dir=str(tmp_path / "out"), fingerprint="f", calibration=str(tmp_path / "model")
    )
    reports = OwnedFolder(tmp_path / "out", "evaluate")
    written = {"settings": {**run_settings(config), **found[0]}, "benchmark": "mmeb", "fingerprint": "f"}
    reports.write_json("results.json", written)
    (difference,) = _differences(reports, config, "mmeb")
    assert difference.startswith("calibration_digest is ")


def test_sugarcrepe_takes_neither() -> None:
    refuse_comparison(ComparisonOptions(), "SugarCrepe")
    for options in ({"calibration": "own"}, {"scoring": "csls"}):
        with pytest.raises(Gen2EmbedError, match="SugarCrepe compares an image with the captions of its own record"):
            refuse_comparison(ComparisonOptions(**options), "SugarCrepe")
