"""Calibration and CSLS on images with captions: against a slow recomputation, without encoding anything again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from plain_encoder import PlainEncoder
from slow_calibration import own_map

from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.retrieval.evaluate import evaluate_retrieval
from gen2embed_mteb.retrieval.report import markdown

WIDTH = 12
CHOICES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "csls": {"scoring": "csls"},
    "csls of 3": {"scoring": "csls", "csls_neighbors": 3},
    "own": {"calibration": "own"},
    "own, a mean per side": {"calibration": "own", "means": "side", "shrinkage": 0.5},
    "own, csls": {"calibration": "own", "scoring": "csls"},
    "own, cut, csls": {"calibration": "own", "truncate_dim": 5, "scoring": "csls"},
}


def near(side: str, number: int, what: str) -> np.ndarray:
    """A unit vector near that of the number's picture, on each side in another part of the space."""
    scene = np.random.default_rng(number).normal(size=WIDTH)
    noise = np.random.default_rng([len(what), *what.encode(), len(side)]).normal(size=WIDTH)
    row = scene + 1.2 * noise + (2.0 if side == "query" else -1.0) * np.eye(WIDTH)[0]
    return (row / np.linalg.norm(row)).astype(np.float32)


class Scenes(PlainEncoder):
    """Gives captions and pictures of a number vectors near each other; the red of a picture is its number."""

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        super()._encode(side, inputs)
        return np.stack([of_item(side, entry) for entry in inputs])


def of_item(side: str, entry: dict[str, Any]) -> np.ndarray:
    if "image" in entry:
        number = int(entry["image"].getpixel((0, 0))[0])
        return near(side, number, f"picture {number}")
    return near(side, int(entry["text"].split()[0]), entry["text"])


def rows() -> list[tuple[int, list[str]]]:
    """60 pictures with two captions; the last two repeat the first picture, and one repeats its caption too."""
    made = [(number, [f"{number} one", f"{number} two"]) for number in range(58)]
    return [*made, (0, ["0 one", "58 other"]), (0, ["59 one", "59 two"])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    table = []
    for number, captions in rows():
        packed = io.BytesIO()
        Image.new("RGB", (28, 28), (number, 7, 7)).save(packed, "PNG")
        table.append({"image": {"bytes": packed.getvalue(), "path": None}, "text": captions})
    pq.write_table(pa.Table.from_pylist(table), root / "test-0.parquet")
    return root


def settings(data: Path, output: Path, **changes: Any) -> EvaluationConfig:
    shared = {"data_dir": str(data), "output_dir": str(output), "fingerprint": "scenes"}
    return EvaluationConfig(**{**shared, "embedding_dir": str(output.parent / "vectors"), **changes})


def slow(direction: str, config: EvaluationConfig) -> dict[str, float]:
    """Recall and strict recall of a direction, one query at a time in float64."""
    pictures = [(number, owner) for owner, (number, _) in enumerate(rows())]
    captions = [(text, owner) for owner, (_, texts) in enumerate(rows()) for text in texts]
    forward = direction == "text_to_image"
    queries, candidates = (captions, pictures) if forward else (pictures, captions)
    sides = {}
    for side, items in (("query", queries), ("document", candidates)):
        keys = list(dict.fromkeys(key for key, _ in items))
        numbered = [(key, int(key.split()[0])) if isinstance(key, str) else (f"picture {key}", key) for key in keys]
        sides[side] = (keys, np.stack([near(side, number, what) for what, number in numbered]).astype(np.float64))
    vectors = {side: found for side, (_, found) in sides.items()}
    if config.calibration:
        vectors = own_map(vectors, config.shrinkage, config.means)
    if config.truncate_dim:
        vectors = {side: found[:, : config.truncate_dim] for side, found in vectors.items()}
        vectors = {side: found / np.linalg.norm(found, axis=1, keepdims=True) for side, found in vectors.items()}
    cosines = vectors["query"] @ vectors["document"].T
    if config.scoring == "csls":
        nearest = -np.sort(-cosines, axis=0)[: config.csls_neighbors]
        cosines = 2 * cosines - nearest.mean(axis=0)
    places = {side: {key: place for place, key in enumerate(keys)} for side, (keys, _) in sides.items()}
    ranks: dict[bool, list[int]] = {False: [], True: []}
    for key, owner in queries:
        scores = cosines[places["query"][key]]
        mine = max(scores[places["document"][other]] for other, whose in candidates if whose == owner)
        others = [scores[places["document"][other]] for other, whose in candidates if whose != owner]
        ranks[False].append(sum(score > mine for score in others))
        ranks[True].append(sum(score >= mine for score in others))
    return {
        f"recall_at_{k}{'_strict' if strict else ''}": float((np.array(ranks[strict]) < k).mean())
        for strict in (False, True)
        for k in (1, 5, 10)
    }


def test_every_comparison_is_the_slow_one_and_encodes_nothing_again(data: Path, tmp_path: Path) -> None:
    first = Scenes()
    evaluate_retrieval(first, "flickr30k", settings(data, tmp_path / "first"))
    assert sum(first.given.values()) == 2 * (58 + 119)
    written: dict[str, Any] = {}
    for name, choice in CHOICES.items():
        config, encoder = settings(data, tmp_path / name, **choice), Scenes()
        (score,) = evaluate_retrieval(encoder, "flickr30k", config).scores
        assert not encoder.given
        ranks = score.ranks["text_to_image"]
        # The first picture is there three times: a caption of one of them ties with the two others by every score.
        of_first = [0, 1, 116, 117, 118, 119]
        assert ((ranks.strict - ranks.official)[of_first] == 2).all()
        written[name] = json.loads((tmp_path / name / "results.json").read_text())
        for direction in ("text_to_image", "image_to_text"):
            found = written[name]["datasets"]["flickr30k"][direction]
            assert found == pytest.approx(slow(direction, config), abs=1e-12), (name, direction)
    figures = {name: one["datasets"]["flickr30k"]["text_to_image"]["recall_at_1"] for name, one in written.items()}
    assert len(set(figures.values())) > 3  # the choices do differ
    plain, csls, own = (written[name] for name in ("cosine", "csls", "own"))
    assert not plain["method"]["transductive"] and "num_unlabelled_inputs" not in plain["datasets"]["flickr30k"]
    # Each distinct input once: 119 captions (one is repeated) and 58 pictures.
    assert csls["datasets"]["flickr30k"]["num_unlabelled_inputs"] == {"text_to_image": 119, "image_to_text": 58}
    assert own["datasets"]["flickr30k"]["num_unlabelled_inputs"] == {"text_to_image": 177, "image_to_text": 177}
    assert own["method"]["unlabelled_inputs"] == [{"count": 354, "of": "own inputs"}]
    assert csls["method"]["unlabelled_inputs"] == [{"count": 177, "of": "own queries"}]


def test_the_report_says_that_a_figure_is_transductive(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "out", scoring="csls")
    text = markdown(evaluate_retrieval(Scenes(), "flickr30k", config), config)
    assert "compared by `csls`" in text and "compare with transductive figures only" in text
    plain = settings(data, tmp_path / "plain")
    assert "ransductive:" not in markdown(evaluate_retrieval(Scenes(), "flickr30k", plain), plain).replace(
        "transductive: no", ""
    )
    with pytest.raises(StoreMismatchError, match="scoring is 'csls' there and None now"):
        evaluate_retrieval(Scenes(), "flickr30k", settings(data, tmp_path / "out"))


def test_too_few_inputs_are_refused_before_anything_is_encoded(data: Path, tmp_path: Path) -> None:
    encoder = Scenes()
    config = settings(data, tmp_path / "out", calibration="own", limit=20)
    with pytest.raises(Gen2EmbedError, match=r"flickr30k: --calibration own: .*60"):
        evaluate_retrieval(encoder, "flickr30k", config)
    assert not encoder.given and not (tmp_path / "out" / "results.json").exists()


def test_a_second_dataset_without_a_usable_row_is_refused_first(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "both"
    (root / "flickr30k_test").mkdir(parents=True)
    (root / "flickr30k_test" / "test-0.parquet").write_bytes((data / "test-0.parquet").read_bytes())
    for part in ("caption", "image"):
        (root / "Urban1k" / part).mkdir(parents=True)
    (root / "Urban1k" / "caption" / "1.txt").write_text("A street without a picture.\n")
    encoder = Scenes()
    with pytest.raises(Gen2EmbedError, match="Urban1k: no row can be used; the first fault is its image"):
        evaluate_retrieval(encoder, "diverse", settings(root, tmp_path / "out"))
    assert not encoder.given
