"""Reranking in an evaluation: figures of a slow recomputation, resuming, faults, shares, settings, reports."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmeb_files import COLOURS, colour_rows, eval_row, write_images, write_table
from PIL import Image
from plain_encoder import PlainEncoder, vector

from gen2embed_mteb import cli
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.reranking.query_scorer import PairScores
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.report import markdown, text_table
from gen2embed_mteb.mmeb.reranking.judge import FOLDER, Judge

NAMES = list(COLOURS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_images(root / "img")
    write_table(root / "VOC2007" / "test-0.parquet", [row for _ in range(10) for row in colour_rows(NAMES)])
    return root


class Scorer:
    """Scores by the length of the candidate's text: deterministic, and unlike the embedding; counts its calls."""

    def __init__(self, stop_after: int | None = None, refuse: str = "") -> None:
        self.calls: list[tuple[str, ...]] = []
        self.stop_after, self.refuse = stop_after, refuse

    def score(self, query: dict[str, Any], candidates: list[dict[str, Any]]) -> PairScores:
        texts = tuple(one["text"] for one in candidates)
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        if self.refuse in texts:
            raise Gen2EmbedError(f"{self.refuse} is refused")
        self.calls.append(texts)
        scores = np.array([len(text) for text in texts], np.float32) / 3
        options = np.stack([scores, scores * 0 + 1], axis=1)[:, None] / 100
        return PairScores(scores, options.astype(np.float32), 10 * len(texts), 30 * len(texts))

    def judge(self, identity: str = "scorer") -> Judge:
        return Judge(self.score, "mcq", ("A", "B"), identity)


def unit_rows(seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(len(NAMES), 3))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


PLACES = {"query": unit_rows(0), "document": unit_rows(1)}


class Placed(PlainEncoder):
    """A vector for each colour: that of the picture for a query, that of the name for a document."""

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        colours = list(COLOURS.values())
        numbers = [
            colours.index(entry["image"].getpixel((0, 0))) if entry.get("image") else NAMES.index(entry["text"])
            for entry in inputs
        ]
        return PLACES[side][numbers]


def settings(data: Path, output: Path, **changes: Any) -> EvaluationConfig:
    values = {"fingerprint": "plain", "subsets": ("VOC2007",), "rerank": "mcq", "rerank_top": 3}
    return EvaluationConfig(data_dir=str(data), output_dir=str(output), **{**values, **changes})


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    for part in (content, content.get("rerank", {}), *content.get("rerank", {}).get("datasets", {}).values()):
        part.pop("seconds", None)
    return content


def test_both_figures_are_those_of_a_slow_recomputation(data: Path, tmp_path: Path) -> None:
    scorer = Scorer()
    result = evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"), judge=scorer.judge())
    before = after = 0
    for name in NAMES:
        query = vector("Name the colour", [Image.new("RGB", (32, 32), COLOURS[name])])
        listed = [name, *(other for other in NAMES if other != name)]
        order = sorted(listed, key=lambda one: -float(vector(one, []) @ query))
        before += order[0] == name
        best = sorted(order[:3], key=lambda one: -len(one))  # stable: ties keep the embedding's order
        after += best[0] == name
    written = results(tmp_path / "out")["rerank"]
    found = written["datasets"]["VOC2007"]
    assert (found["precision_at_1_before"], found["precision_at_1_after"]) == (before / 5, after / 5)
    assert before != after
    assert written["before"]["precision_at_1"] == before / 5 == result.scores[0].precision_at_1
    assert written["after"]["meta_tasks"] == {"Classification": after / 5}
    assert (found["num_queries"], found["num_pairs"], found["num_tokens"], found["num_tokens_saved"]) == (
        50,
        150,
        1500,
        3000,
    )
    lengths = np.array([len(text) for texts in scorer.calls for text in texts])
    assert found["answers"] == 150
    assert found["mass_on_options"] == pytest.approx((lengths / 300 + 0.01).mean(), rel=1e-6)
    assert found["share_of_first_option"] == (lengths > 3).mean()
    assert "the model does not answer" in found["warning"]
    for shown in (text_table(result, settings(data, tmp_path / "x")), markdown(result, settings(data, tmp_path / "x"))):
        assert "WARNING: the model does not answer" in shown and "67 %" in shown


def test_the_candidates_are_those_of_the_final_scores_and_each_row_says_how_it_was_made(
    data: Path, tmp_path: Path
) -> None:
    """CSLS with one neighbour, recomputed: its best three candidates are others than those of the cosine."""
    changes: dict[str, Any] = {"rerank": "mcq-both", "rerank_limit": 5}
    config = settings(data, tmp_path / "out", scoring="csls", csls_neighbors=1, **changes)
    scorer, plain = Scorer(), Scorer()
    result = evaluate(Placed(), MMEB, config, judge=scorer.judge())
    evaluate(Placed(), MMEB, settings(data, tmp_path / "cosine", **changes), judge=plain.judge())
    cosines = PLACES["query"].astype(np.float64) @ PLACES["document"].T.astype(np.float64)
    for found, scores in ((plain, cosines), (scorer, 2 * cosines - cosines.max(axis=0))):
        assert found.calls == [tuple(NAMES[place] for place in np.argsort(-row)[:3]) for row in scores]
    assert [set(texts) for texts in plain.calls] != [set(texts) for texts in scorer.calls]
    written = results(tmp_path / "out")
    embedded, reranked = written["method"], written["rerank"]["method"]
    assert (embedded["rerank_k"], embedded["forwards_per_query"]) == (0, 1)
    assert (reranked["rerank_k"], reranked["forwards_per_query"]) == (3, 7)  # the query, and each pair in both orders
    assert embedded["transductive"] and reranked["transductive"]
    assert reranked["unlabelled_inputs"] == embedded["unlabelled_inputs"] == [{"count": 5, "of": "own queries"}]
    rows = [line.split() for line in text_table(result, config).splitlines() if line.startswith("ours")]
    label = ["ours,", "top", "3", "reranked,", "first", "5", "rows"]
    (method,) = [row for row in rows if row[: len(label)] == label and row[-2:] == ["yes", "3"]]
    assert method[len(label) :] == ["model", "7", "5", "own", "queries", "yes", "3"]
    assert "ours, top 3 reranked, first 5 rows, strict" in markdown(result, config)


def test_only_the_first_rows_are_reranked_and_compared_with_themselves(data: Path, tmp_path: Path) -> None:
    scorer = Scorer()
    config = settings(data, tmp_path / "out", rerank_limit=7)
    result = evaluate(PlainEncoder(), MMEB, config, judge=scorer.judge())
    assert len(scorer.calls) == 7
    (found,) = result.reranked
    assert found.before.rows == result.scores[0].rows[:7]
    assert len(result.scores[0].rows) == 50


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(data: Path, tmp_path: Path) -> None:
    whole = Scorer()
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "whole"), judge=whole.judge())
    first, second = Scorer(stop_after=40), Scorer()
    with pytest.raises(KeyboardInterrupt):
        evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"), judge=first.judge())
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"), judge=second.judge())
    assert len(second.calls) == 50 - 32  # the first shard was finished
    assert results(tmp_path / "out") | {"settings": 0} == results(tmp_path / "whole") | {"settings": 0}
    again = Scorer()
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"), judge=again.judge())
    assert again.calls == []
    other = Scorer()  # another model or framing: nothing of the first is used
    config = settings(data, tmp_path / "out", overwrite=True)
    evaluate(PlainEncoder(), MMEB, config, judge=other.judge("other"))
    assert len(other.calls) == 50


def test_a_pair_that_cannot_be_scored_sets_its_row_aside(data: Path, tmp_path: Path) -> None:
    rows = [eval_row("<|image_1|>\nName it\n", "img/red.png", [(name, "") for name in ("red", "odd", "blue")])]
    write_table(data / "VOC2007" / "test-0.parquet", [*colour_rows(NAMES), *rows])
    config = settings(data, tmp_path / "out", max_error_rate=0.5)
    result = evaluate(PlainEncoder(), MMEB, config, judge=Scorer(refuse="odd").judge())
    (error,) = result.errors
    assert (error.dataset, error.row, error.reason) == ("VOC2007", 5, "refused by the reranker: odd is refused")
    assert (len(result.scores[0].rows), len(result.reranked[0].after.rows)) == (6, 5)
    assert results(tmp_path / "out")["rerank"]["datasets"]["VOC2007"]["num_errors"] == 1
    assert "odd is refused" in (tmp_path / "out" / "errors.jsonl").read_text()


def test_processes_share_the_pairs(data: Path, tmp_path: Path) -> None:
    scorers = [Scorer(), Scorer()]

    def run(rank: int) -> None:
        share = Share(rank, 2, poll_interval=0.01)
        evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"), share, judge=scorers[rank].judge())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(scorer.calls) for scorer in scorers] == [32, 18]
    alone = Scorer()
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "alone"), judge=alone.judge())
    assert results(tmp_path / "out")["rerank"] == results(tmp_path / "alone")["rerank"]


@pytest.mark.parametrize("weight", [2.0, 1e6])
def test_the_score_of_the_embedding_is_added_with_its_weight(data: Path, tmp_path: Path, weight: float) -> None:
    found = evaluate(
        PlainEncoder(), MMEB, settings(data, tmp_path / "out", rerank_weight=weight), judge=Scorer().judge()
    )
    after = 0
    for name in NAMES:
        query = vector("Name the colour", [Image.new("RGB", (32, 32), COLOURS[name])])
        listed = [name, *(other for other in NAMES if other != name)]
        best = sorted(listed, key=lambda one: -float(vector(one, []) @ query))[:3]
        after += max(best, key=lambda one: len(one) / 3 + weight * float(vector(one, []) @ query)) == name
    written = results(tmp_path / "out")
    assert written["rerank"]["after"]["precision_at_1"] == after / 5
    if weight == 1e6:  # the embedding alone decides
        assert written["rerank"]["before"]["precision_at_1"] == after / 5
    assert f"plus {weight:g} times the embedding's score" in text_table(
        found, settings(data, tmp_path / "x", rerank_weight=weight)
    )


def test_reports_of_runs_with_and_without_reranking_are_not_mixed(data: Path, tmp_path: Path) -> None:
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", rerank=None, rerank_top=10))
    assert "rerank" not in results(tmp_path / "out") and not (tmp_path / "out" / FOLDER).exists()
    with pytest.raises(StoreMismatchError, match="rerank is None there and 'mcq' now"):
        evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"), judge=Scorer().judge())


def test_settings_are_checked_before_anything_is_done(data: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(Gen2EmbedError, match="rerank is 'abc'; known: mcq"):
        settings(data, tmp_path, rerank="abc")
    with pytest.raises(Gen2EmbedError, match="need --rerank FRAMING"):
        settings(data, tmp_path, rerank=None)
    with pytest.raises(Gen2EmbedError, match="rerank_weight is -1; pass 0 or a positive number"):
        settings(data, tmp_path, rerank_weight=-1)
    with pytest.raises(Gen2EmbedError, match="need --rerank FRAMING"):
        settings(data, tmp_path, rerank=None, rerank_top=10, rerank_weight=1.0)
    with pytest.raises(Gen2EmbedError, match="rerank_top is 0; pass 1 or more"):
        settings(data, tmp_path, rerank_top=0)
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "sugarcrepe-mini", "--rerank", "mcq"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "no")]) == 2
    assert "--rerank is for MMEB and mmeb-mini" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_likelihood_answers_the_questions_of_mmeb_mini_better_than_the_embedding(tmp_path: Path) -> None:
    """The miniature cannot answer with A or B, but it can tell which word answers: + 5 points and more."""
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--device", "cpu"]
    words += ["--meta_task", "VQA", "--limit", "100", "--rerank", "likelihood", "--rerank_top", "5"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    found = results(tmp_path / "out")["rerank"]
    assert 100 * (found["after"]["precision_at_1"] - found["before"]["precision_at_1"]) >= 5
    assert 100 * (found["after"]["precision_at_1_strict"] - found["before"]["precision_at_1_strict"]) >= 5
    assert found["num_tokens_saved"] > found["num_tokens"]
    assert "mass_on_options" not in found


@pytest.mark.slow
def test_default_folders_share_one_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--device", "cpu"]
    words += ["--subsets", "AttributeQA", "--limit", "4"]
    assert cli.main(words) == 0
    root = tmp_path / "results/mmeb-mini/gen2embed-mini"
    before = {path.name: path.stat().st_mtime_ns for path in (root / "hierarchical/embeddings").glob("*.npy")}
    assert before
    assert cli.main([*words, "--scoring", "csls", "--rerank", "likelihood", "--rerank_top", "3"]) == 0
    names = ["hierarchical", "hierarchical-csls-rerank-likelihood-3"]
    assert sorted(path.name for path in root.iterdir()) == names
    assert not (root / names[1] / "embeddings").exists()
    after = {path.name: path.stat().st_mtime_ns for path in (root / "hierarchical/embeddings").glob("*.npy")}
    assert after == before


@pytest.mark.slow
def test_the_miniature_does_not_answer_and_pictures_are_reranked(tmp_path: Path, capsys: Any) -> None:
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--device", "cpu"]
    words += ["--subsets", "ColorShape", "Changed", "--limit", "4", "--rerank", "mcq-both", "--rerank_top", "3"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert "WARNING: the model does not answer" in capsys.readouterr().out
    found = results(tmp_path / "out")["rerank"]
    assert found["mass_on_options"] < 0.01 and found["answers"] == 2 * found["num_pairs"] == 2 * 3 * 8
    likelihood = [*words[:-4], "--rerank", "likelihood", "--output_dir", str(tmp_path / "other")]
    assert cli.main(likelihood) == 0
    skipped = results(tmp_path / "other")["rerank"]["datasets"]["Changed"]
    assert skipped == {"skipped": "likelihood takes texts, its candidates are images"}
