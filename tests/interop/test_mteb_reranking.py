"""mteb's two-stage reranking: the best candidates of the embedder, reordered by the reranker of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
from mteb.mocks import MOCK_MIEB_TASK_GRID, MOCK_TASK_TEST_GRID
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.mteb_plugin.models import reranker as module

pytestmark = pytest.mark.slow

MOCKS = {task.metadata.name: task for task in (*MOCK_TASK_TEST_GRID, *MOCK_MIEB_TASK_GRID)}


@pytest.fixture(scope="module")
def reranker() -> Any:
    return mteb.get_model("gen2embed-mini-reranker", device="cpu")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MMEB-mini: 6 rows a dataset."""
    root = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_QUERIES", 6)
        benchmark.ensure("eval", root)
    return root


def test_rerankers_are_registered_beside_their_models(reranker: Any) -> None:
    for alias in ("gen2embed-mini", "gen2embed", "gen2embed-qwen2.5-vl-7b"):
        meta, other = mteb.get_model_meta(alias), mteb.get_model_meta(f"{alias}-reranker")
        assert other.name == f"{meta.name}-reranker"
        assert other.is_cross_encoder and not meta.is_cross_encoder
        assert other.modalities == meta.modalities
    meta = mteb.get_model_meta("gen2embed-mini-reranker")
    weights = mteb.get_model_meta("gen2embed-mini").revision
    assert meta.revision.startswith(f"{weights}-") and len(meta.revision) == len(weights) + 9
    assert isinstance(reranker, CrossEncoderProtocol) and not isinstance(reranker, EncoderProtocol)
    assert reranker.mteb_model_meta.name == "Gen2Embed/gen2embed-mini-reranker"
    likelihood = mteb.get_model("gen2embed-mini-reranker", device="cpu", framing="likelihood")
    assert likelihood.model.framing.name == "likelihood"


@pytest.mark.parametrize("dataset", ["AttributeQA", "Scenes_t2i", "Pointing"])
def test_two_stages_on_mmeb_mini(
    dataset: str, reranker: Any, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures on the query's side, on the candidates', and on both; scores are those of `predict`."""
    monkeypatch.setenv("MMEB_MINI_DIR", str(mini))
    datasets.disable_progress_bars()
    name = f"MMEB-mini-{dataset}"
    mteb.evaluate(
        mteb.get_model("gen2embed-mini", device="cpu"),
        mteb.get_task(name),
        cache=None,
        show_progress_bar=False,
        prediction_folder=tmp_path / "first",
    )
    task = mteb.get_task(name).convert_to_reranking(tmp_path / "first", top_k=3)
    split = task.dataset["default"]["test"]
    top_ranked = {query: list(names) for query, names in split["top_ranked"].items()}
    assert {len(names) for names in top_ranked.values()} == {3}
    queries, corpus = list(split["queries"]), {row["id"]: row for row in split["corpus"]}
    monkeypatch.setattr(module, "MAX_CANDIDATES", 2)
    result = mteb.evaluate(reranker, task, cache=None, show_progress_bar=False, prediction_folder=tmp_path / "second")
    predictions = json.loads((tmp_path / "second" / f"{name}_predictions.json").read_text())["default"]["test"]
    plain = Gen2Embed("gen2embed-mini", device="cpu").reranker()
    hits = 0
    for query in queries:
        found = predictions[query["id"]]
        assert list(found) == top_ranked[query["id"]]
        pairs = [(given(query), given(corpus[one])) for one in found]
        assert np.abs(plain.predict(pairs) - list(found.values())).max() < 1e-4
        positive = next(iter(task.dataset["default"]["test"]["relevant_docs"][query["id"]]))
        hits += positive in found and found[positive] == max(found.values())
    (scores,) = result.task_results[0].scores["test"]
    assert scores["mmeb_precision_at_1"] == pytest.approx(hits / 6)


def given(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("text", "image") if row.get(key) is not None}


@pytest.mark.parametrize("name", ["MockRerankingTask", "MockInstructionReranking"])
def test_mtebs_own_reranking_tasks_run(name: str, reranker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    score = reranker._scorer.score

    def record(query: dict[str, Any], candidates: list[dict[str, Any]]) -> Any:
        seen.append((query["text"], [one["text"] for one in candidates]))
        return score(query, candidates)

    monkeypatch.setattr(reranker._scorer, "score", record)
    result = mteb.evaluate(reranker, MOCKS[name], cache=None, show_progress_bar=False)
    assert isinstance(result.task_results[0].scores["test"][0]["main_score"], float)
    said = "Retrieve text based on user query.\n"
    asked = {"MockRerankingTask": said, "MockInstructionReranking": f"{said}This is a test instruction\n"}[name]
    assert f"{asked}This is a test sentence" in {query for query, _ in seen}
    assert all(text.startswith("Title of d") for _, texts in seen for text in texts)
