"""ShareGPT4V and Urban1K in mteb's own runner: its hit rates are the recall of `gen2embed evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from PIL import Image

from gen2embed_mteb import cli
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.retrieval.datasets import SHAREGPT4V


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of noise in both layouts."""
    root = tmp_path_factory.mktemp("captions")
    chance = np.random.default_rng(0)
    entries = []
    for folder in ("Urban1k/caption", "Urban1k/image", "ShareGPT4V/sam"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        image = Image.fromarray(chance.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        image.save(root / f"Urban1k/image/{number}.png")
        (root / f"Urban1k/caption/{number}.txt").write_text(f"A street with {number} red cars.")
        image.save(root / f"ShareGPT4V/sam/{number}.png")
        said = [{"value": "What?"}, {"value": f"Noise\nnumber {number}."}]
        entries.append({"image": f"sam/{number}.png", "conversations": said})
    (root / "ShareGPT4V" / SHAREGPT4V.file).write_text(json.dumps(entries))
    return root


@pytest.mark.slow
def test_hit_rates_are_our_recalls(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URBAN1K_DIR", str(data / "Urban1k"))
    monkeypatch.setenv("SHAREGPT4V_DIR", str(data / "ShareGPT4V"))
    words = ["evaluate", "--model_name", "gen2embed-mini", "--device", "cpu", "--benchmark", "diverse"]
    assert cli.main([*words, "--data_dir", str(data), "--output_dir", str(tmp_path / "out")]) == 0
    ours = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]
    model = mteb.get_model("gen2embed-mini", device="cpu")
    for name, title in (("urban1k", "Urban1K"), ("sharegpt4v", "ShareGPT4V")):
        for direction, column in (("I2T", "image_to_text"), ("T2I", "text_to_image")):
            task: Any = mteb.get_task(f"{title}{direction}Retrieval")
            results = mteb.evaluate(model, task, cache=None, encode_kwargs={"show_progress_bar": False})
            found = results.task_results[0].scores["test"][0]
            for k in (1, 5, 10):
                assert found[f"hit_rate_at_{k}"] == pytest.approx(ours[name][column][f"recall_at_{k}"], abs=1e-5), (
                    title,
                    k,
                )
            assert task.num_errors == 0


def test_without_the_data_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHAREGPT4V_DIR", raising=False)
    with pytest.raises(DataError, match="name its folder in SHAREGPT4V_DIR"):
        mteb.get_task("ShareGPT4VI2TRetrieval").load_data()
