"""Prompts per dataset with calibration, CSLS and reranking: against a recomputation from `Gen2Embed` itself."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmeb_files import eval_row, write_images, write_table
from slow_calibration import own_map

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.method import facts_of
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.reranking.judge import open_judge
from gen2embed_mteb.mmeb.scoring import RowScore

DATASETS = ("VOC2007", "GQA")
"""Two datasets of the same rows, whose prompts differ, in the benchmark's order."""
COLOURS, SHAPES = ("red", "green", "blue", "black", "white"), ("circle", "square", "star", "ring", "cross")
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 distinct queries, and 50 distinct candidates, six of them in each row."""
    root, rng = tmp_path_factory.mktemp("prompts") / "data", random.Random(0)
    targets = [f"a {size} {colour} {shape}" for size in ("tiny", "big") for colour in COLOURS for shape in SHAPES]
    rows = []
    for number, target in enumerate(targets):
        others = rng.sample([text for text in targets if text != target], 4)
        candidates = [(text, "") for text in (target, *others, targets[number - 1])]
        rows.append(eval_row(f"What is {target[2:]}?", "", candidates))
    for name in DATASETS:
        write_table(root / name / "test-0.parquet", rows)
    write_images(root / "img")
    return root


@pytest.fixture(scope="module")
def model() -> Gen2Embed:
    return Gen2Embed("gen2embed-mini", device="cpu", prompt_mode="freeret")


@pytest.fixture(scope="module")
def vectors(data: Path, model: Gen2Embed) -> dict[str, dict[str, np.ndarray]]:
    """The vectors of the distinct queries and candidates, by dataset and side, without bulk encoding."""
    queries, candidates, _ = inputs(data)
    return {
        name: {
            "query": model.encode_query(queries, prompt_name=f"{name}:query").astype(np.float64),
            "document": model.encode_document(candidates, prompt_name=f"{name}:document").astype(np.float64),
        }
        for name in DATASETS
    }


def inputs(data: Path) -> tuple[list[str], list[str], np.ndarray]:
    """The distinct queries, the distinct candidates, and the numbers of each row's candidates."""
    import pyarrow.parquet as pq

    rows = pq.read_table(data / DATASETS[0] / "test-0.parquet").to_pylist()
    candidates = list(dict.fromkeys(text for row in rows for text in row["tgt_text"]))
    numbers = np.array([[candidates.index(text) for text in row["tgt_text"]] for row in rows])
    return [row["qry_text"] for row in rows], candidates, numbers


def settings(data: Path, output: Path, model: Gen2Embed, **changes: Any) -> EvaluationConfig:
    facts = {**facts_of(model, "gen2embed-mini"), "fingerprint": fingerprint(model), "subsets": DATASETS}
    # The tests share one encoding.
    places = {"data_dir": str(data), "output_dir": str(output), "embedding_dir": str(data.parent / "vectors")}
    return EvaluationConfig(**{**places, **facts, **changes})


def agree(rows: tuple[RowScore, ...], scores: np.ndarray) -> bool:
    """Whether the ranks are those of the scores (n, k), of which the first is the positive's, up to rounding."""
    gaps = scores[:, 1:] - scores[:, :1]
    least, most = (gaps > ROUNDING).sum(axis=1), (gaps > -ROUNDING).sum(axis=1)
    return len(rows) == len(scores) and all(
        low <= row.rank <= high for row, low, high in zip(rows, least, most, strict=True)
    )


@pytest.mark.parametrize("choice", [{"calibration": "own"}, {"scoring": "csls"}], ids=["own", "csls"])
def test_vectors_are_compared_under_their_own_dataset_s_prompts(
    data: Path, tmp_path: Path, model: Gen2Embed, vectors: Any, choice: dict[str, str]
) -> None:
    result = evaluate(PrefixEncoder(model), MMEB, settings(data, tmp_path, model, **choice))
    numbers = inputs(data)[2]
    expected = {}
    for name, found in vectors.items():
        sides = own_map(found, 0.9, "shared") if "calibration" in choice else found
        scores = sides["query"] @ sides["document"].T
        if "scoring" in choice:
            scores = 2 * scores - -np.sort(-scores, axis=0)[:10].mean(axis=0)
        expected[name] = np.take_along_axis(scores, numbers, axis=1)
    one, other = result.scores
    assert agree(one.rows, expected[DATASETS[0]]) and agree(other.rows, expected[DATASETS[1]])
    assert not agree(one.rows, expected[DATASETS[1]])  # the same rows: the prompts make the difference
    assert not agree(other.rows, expected[DATASETS[0]])


def test_the_best_candidates_under_a_dataset_s_prompts_are_reranked(
    data: Path, tmp_path: Path, model: Gen2Embed, vectors: Any
) -> None:
    """The question to the generator is the same in every dataset, and under every prompt of the embedding."""
    config = settings(data, tmp_path, model, rerank="mcq", rerank_top=2, rerank_limit=4)
    judge = open_judge(model, "mcq", config.fingerprint)
    result = evaluate(PrefixEncoder(model), MMEB, config, judge=judge)
    queries, candidates, numbers = inputs(data)
    scorer = Gen2Embed("gen2embed-mini", device="cpu").reranker("mcq")
    chosen = []
    for name, found in zip(DATASETS, result.reranked, strict=True):
        scores = np.take_along_axis(vectors[name]["query"] @ vectors[name]["document"].T, numbers, axis=1)[:4]
        best = np.argsort(-scores, axis=1)[:, :2]
        chosen.append(best.tolist())
        pairs = [(queries[row], candidates[numbers[row, place]]) for row in range(4) for place in best[row]]
        second = scorer.predict(pairs).reshape(4, 2)
        for row, places in enumerate(best):
            (own,) = np.flatnonzero(places == 0) if 0 in places else (None,)
            rank = (scores[row] > scores[row, 0]).sum() if own is None else (second[row] > second[row, own]).sum()
            assert found.after.rows[row].rank == rank, (name, row)
        assert found.num_pairs == 8
    assert chosen[0] != chosen[1]


def test_a_calibration_of_the_usual_prompt_is_said(
    data: Path, tmp_path: Path, model: Gen2Embed, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated = Gen2Embed("gen2embed-mini", device="cpu", prompt_mode="freeret")
    queries, candidates, _ = inputs(data)
    calibrated.calibrate(queries, candidates)
    calibrated.save_pretrained(str(tmp_path / "calibrated"))
    caplog.set_level(logging.WARNING, logger="gen2embed_mteb")
    said = f"datasets' own prompts: {', '.join(DATASETS)}; --calibration own fits one on each dataset"
    config = settings(data, tmp_path / "applied", model, calibration=str(tmp_path / "calibrated"))
    evaluate(PrefixEncoder(model), MMEB, config)
    assert said in caplog.text
    caplog.clear()
    evaluate(
        PrefixEncoder(calibrated),
        MMEB,
        settings(data, tmp_path / "itself", calibrated, subsets=("GQA",), embedding_dir=""),
    )
    assert "datasets' own prompts: GQA; --calibration own" in caplog.text
    caplog.clear()
    evaluate(PrefixEncoder(model), MMEB, settings(data, tmp_path / "own", model, calibration="own"))
    evaluate(PrefixEncoder(model), MMEB, settings(data, tmp_path / "plain", model))
    assert "own prompts" not in caplog.text
