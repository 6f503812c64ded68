"""Calibration and CSLS in an evaluation run: against a slow recomputation, without encoding anything again."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmeb_files import COLOURS, M, eval_row, write_images, write_table
from plain_encoder import PlainEncoder
from slow_calibration import own_map

from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.scoring import EvaluationResult

WORDS = [f"w{number}" for number in range(60)]


def write_data(root: Path) -> Path:
    """A dataset of texts (30 queries, some repeated; 70 candidates), and one whose candidates are queries."""
    rng = random.Random(0)
    targets = [" ".join(rng.sample(WORDS, 3)) for _ in range(70)]
    rows = []
    for number in range(40):
        positive = targets[number % 30]
        # One word of the positive, and two others, so that some rows are misses.
        query = " ".join([positive.split()[0], *rng.choices(WORDS, k=2)])
        query = query if number < 30 else rows[number - 30]["qry_text"]
        others = rng.sample([text for text in targets if text != positive], 9)
        rows.append(eval_row(query, "", [(text, "") for text in [positive, *others, positive]]))
    write_table(root / "GQA" / "test-0.parquet", rows)
    write_images(root / "img")
    for name in COLOURS:  # the same pictures under other names
        (root / "img" / f"{name}-copy.png").write_bytes((root / "img" / f"{name}.png").read_bytes())
    rows = []
    for number in range(60):
        name = list(COLOURS)[number % 5]
        pairs = [(f"{M}\nSelect {WORDS[number]}\n", f"img/{name}-copy.png")]
        pairs += [(f"{M}\nSelect {WORDS[(number + step) % 60]}\n", "img/red.png") for step in (1, 2)]
        rows.append(eval_row(f"{M}\nFind {WORDS[number]}\n", f"img/{name}.png", pairs))
    write_table(root / "RefCOCO-Matching" / "test-0.parquet", rows)
    return root


class WordVectors(PlainEncoder):
    """The mean of the words' random vectors: nothing depends on the batch, and no two candidates tie by chance."""

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        texts = [entry["text"].split() for entry in inputs]
        rows = [sum(np.random.default_rng(list(word.encode())).normal(size=32) for word in words) for words in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def settings(data: Path, output: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {"data_dir": str(data), "output_dir": str(output), "fingerprint": "plain"}
    return EvaluationConfig(**{**values, "subsets": ("GQA", "RefCOCO-Matching"), "batch_size": 8, **changes})


def slow(data: Path, config: EvaluationConfig, result: EvaluationResult) -> list[tuple[int, bool]]:
    """(rank, strict) of every row of GQA, from the stored vectors of its distinct texts."""
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "GQA" / "test-0.parquet").to_pylist()
    queries = list(dict.fromkeys(row["qry_text"] for row in rows))
    documents = list(dict.fromkeys(text for row in rows for text in row["tgt_text"]))
    encoder = WordVectors()
    vectors = {
        "query": encoder.encode_query([{"text": text} for text in queries]).astype(np.float64),
        "document": encoder.encode_document([{"text": text} for text in documents]).astype(np.float64),
    }
    if config.calibration == "own":
        vectors = own_map(vectors, config.shrinkage, config.means)
    if config.truncate_dim:
        vectors = {side: rows[:, : config.truncate_dim] for side, rows in vectors.items()}
        vectors = {side: rows / np.linalg.norm(rows, axis=1, keepdims=True) for side, rows in vectors.items()}
    cosines = vectors["query"] @ vectors["document"].T
    scores = cosines
    if config.scoring == "csls":
        nearest = -np.sort(-cosines, axis=0)[: config.csls_neighbors]
        scores = 2 * cosines - nearest.mean(axis=0)
    found = []
    for row in rows:
        of_row = scores[queries.index(row["qry_text"]), [documents.index(text) for text in row["tgt_text"]]]
        others = [score for score, text in zip(of_row, row["tgt_text"], strict=True) if text != row["tgt_text"][0]]
        found.append((int((of_row > of_row[0] + 1e-9).sum()), bool(max(others) < of_row[0] - 1e-9)))
    return found


CHOICES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "csls": {"scoring": "csls"},
    "csls of 3": {"scoring": "csls", "csls_neighbors": 3},
    "own": {"calibration": "own"},
    "own, side means": {"calibration": "own", "means": "side", "shrinkage": 0.5},
    "own, csls": {"calibration": "own", "scoring": "csls"},
    "cut": {"truncate_dim": 5},
    "own, cut, csls": {"calibration": "own", "truncate_dim": 5, "scoring": "csls"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_scores_equal_a_slow_recomputation(data: Path, tmp_path: Path, name: str) -> None:
    config = settings(data, tmp_path / "out", **CHOICES[name])
    result = evaluate(WordVectors(), MMEB, config)
    assert [(row.rank, row.strict) for row in result.scores[0].rows] == slow(data, config, result)
    assert 0 < (result.scores[0].precision_at_1 or 0) < 1


def test_runs_share_one_encoding_and_say_how_they_were_made(data: Path, tmp_path: Path) -> None:
    written = {}
    for name, choice in CHOICES.items():
        encoder = PlainEncoder()
        config = settings(data, tmp_path / name, embedding_dir=str(tmp_path / "vectors"), **choice)
        evaluate(encoder, MMEB, config)
        assert bool(encoder.given) == (name == "cosine")  # the first run
        assert not (tmp_path / name / "embeddings").exists()
        written[name] = json.loads((tmp_path / name / "results.json").read_text())
        page = (tmp_path / name / "results.md").read_text()
        assert ("Transductive: " in page) == (name not in ("cosine", "cut"))
    plain, csls, own = (written[name] for name in ("cosine", "csls", "own"))
    assert plain["method"] == {
        "backbone": "model",
        "forwards_per_query": 1,
        "unlabelled_inputs": [],
        "transductive": False,
        "rerank_k": 0,
    }
    assert "num_unlabelled_inputs" not in plain["datasets"]["GQA"]
    # GQA: 30 distinct queries, 70 candidates of which some may not be drawn. RefCOCO-Matching: 60 queries; candidates
    # on the same side, each word with its own picture (under another name) and with the red one.
    drawn = len({text for row in rows_of(data, "GQA") for text in row["tgt_text"]})
    counts = {name: entry["num_unlabelled_inputs"] for name, entry in own["datasets"].items()}
    assert counts == {"GQA": 30 + drawn, "RefCOCO-Matching": 60 + 60 + 48}
    assert csls["method"]["unlabelled_inputs"] == [{"count": 30 + 60, "of": "own queries"}]
    assert own["method"]["unlabelled_inputs"] == [{"count": sum(counts.values()), "of": "own inputs"}]
    assert csls["method"]["transductive"] and own["method"]["transductive"]
    assert own["settings"]["calibration"] == "own"
    assert (own["settings"]["shrinkage"], own["settings"]["means"]) == (0.9, "shared")
    assert (csls["settings"]["scoring"], csls["settings"]["csls_neighbors"]) == ("csls", 10)
    assert not {"calibration", "scoring", "shrinkage", "truncate_dim"} & plain["settings"].keys()
    assert written["cut"]["method"] == plain["method"]
    assert written["cut"]["settings"] == {**plain["settings"], "truncate_dim": 5}
    assert "compared by `dim5`" in (tmp_path / "cut" / "results.md").read_text()


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(data / name / "test-0.parquet").to_pylist()
    return rows


def test_a_run_with_another_comparison_is_another_run(data: Path, tmp_path: Path) -> None:
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", calibration="own"))
    before = (tmp_path / "out" / "results.json").read_bytes()
    for change, said in (
        ({}, "calibration is 'own' there and None now"),
        ({"calibration": "own", "shrinkage": 0.5}, r"shrinkage is 0\.9 there and 0\.5 now"),
        ({"calibration": "own", "means": "side"}, "means is 'shared' there and 'side' now"),
        ({"calibration": "own", "scoring": "csls"}, "scoring is None there and 'csls' now"),
    ):
        with pytest.raises(StoreMismatchError, match=said):
            evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", **change))
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    encoder = PlainEncoder()
    evaluate(encoder, MMEB, settings(data, tmp_path / "out", scoring="csls", overwrite=True))
    assert not encoder.given  # other reports, the same vectors


def test_interrupted_it_ends_in_the_same_results(data: Path, tmp_path: Path) -> None:
    class Interrupted(PlainEncoder):
        calls = 12

        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
            return super()._encode(side, inputs)

    choice = {"calibration": "own", "scoring": "csls", "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), MMEB, settings(data, tmp_path / "out", **choice))
    for folder in ("out", "whole"):
        evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / folder, **choice))
    out, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "whole"))
    assert {**out, "seconds": 0} == {**whole, "seconds": 0}


def test_a_collapsed_model_stays_tied(data: Path, tmp_path: Path) -> None:
    class Collapsed(PlainEncoder):
        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            return np.tile(np.float32([0.6, 0.8, 0]), (len(inputs), 1))

    result = evaluate(Collapsed(), MMEB, settings(data, tmp_path / "out", scoring="csls"))
    assert [score.precision_at_1 for score in result.scores] == [1.0, 1.0]
    assert [score.precision_at_1_strict for score in result.scores] == [0.0, 0.0]
    with pytest.raises(Gen2EmbedError, match="GQA: --calibration own: all vectors are equal"):
        evaluate(Collapsed(), MMEB, settings(data, tmp_path / "own", calibration="own"))


def test_too_few_inputs_are_refused_before_any_is_encoded(data: Path, tmp_path: Path) -> None:
    encoder = PlainEncoder()
    # 2 queries, 3 candidates each, of which one is in both rows.
    with pytest.raises(Gen2EmbedError, match=r"RefCOCO-Matching: --calibration own: calibration on 7 inputs.*--limit"):
        config = settings(data, tmp_path / "out", calibration="own", limit=2, subsets=("RefCOCO-Matching",))
        evaluate(encoder, MMEB, config)
    assert not encoder.given
    assert not (tmp_path / "out").exists()


def test_too_few_inputs_with_a_vector_are_refused(data: Path, tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    for path in (root / "img").glob("*.png"):
        if path.stem not in ("red", "red-copy"):
            path.unlink()
    with pytest.raises(Gen2EmbedError, match=r"RefCOCO-Matching: --calibration own: calibration on \d\d inputs"):
        evaluate(PlainEncoder(), MMEB, settings(root, tmp_path / "out", calibration="own"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scoring": "dot"}, "scoring is 'dot'; known: cosine, csls"),
        ({"scoring": "csls", "csls_neighbors": 0}, "csls_neighbors is 0"),
        ({"csls_neighbors": 5}, "csls_neighbors is 5, but scoring is not csls"),
        ({"calibration": "own", "shrinkage": 0.0}, r"shrinkage is 0\.0"),
        ({"calibration": "own", "means": "modality"}, "means is 'modality'"),
        ({"means": "side"}, "nothing is fitted"),
        ({"calibration": "folder", "shrinkage": 0.5}, "nothing is fitted"),
        ({"truncate_dim": 0}, "truncate_dim is 0; pass 1 or more"),
    ],
)
def test_settings_are_checked_at_once(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(Gen2EmbedError, match=said):
        settings(tmp_path, tmp_path, **change)


def test_a_folder_that_is_not_calibrated_is_refused_before_anything_is_encoded(data: Path, tmp_path: Path) -> None:
    encoder = PlainEncoder()
    with pytest.raises(FileNotFoundError, match="given as calibration; pass own, or a folder"):
        evaluate(encoder, MMEB, settings(data, tmp_path / "out", calibration=str(tmp_path / "none")))
    with pytest.raises(Gen2EmbedError, match="is not calibrated"):
        evaluate(encoder, MMEB, settings(data, tmp_path / "out", calibration=str(tmp_path)))
    assert not encoder.given


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, ""),
        ({"calibration": "own"}, "own"),
        ({"calibration": "own", "shrinkage": 0.5, "means": "side"}, "own-a0.5-side"),
        ({"calibration": "some/where"}, "calibrated-where"),
        ({"scoring": "csls"}, "csls"),
        ({"calibration": "own", "scoring": "csls", "csls_neighbors": 5}, "own-csls5"),
        ({"calibration": "own", "truncate_dim": 64, "scoring": "csls"}, "own-dim64-csls"),
    ],
)
def test_names_of_folders(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    assert settings(tmp_path, tmp_path, **change).comparison == name
