"""Cut vectors: the figures are those of sentence-transformers' own truncation, calibrated folders among them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.config import ComparisonOptions
from gen2embed_mteb.embedder.calibration.affine_map import read_calibrated
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.applied_calibration import require_fitting
from gen2embed_mteb.evaluation.truncation import cut

TEXTS = [f"{color} {shape} number {n}" for n in range(6) for color in ("red", "blue", "green") for shape in "abc"]


def test_by_hand() -> None:
    vectors = np.array([[3, 4, 12], [0, 0, 13], [3, 4, 0]], np.float32) / np.array([[13], [13], [5]], np.float32)
    np.testing.assert_allclose(cut(vectors, 2), [[0.6, 0.8], [0, 0], [0.6, 0.8]], rtol=1e-6)
    assert cut(vectors, None) is vectors
    with pytest.raises(Gen2EmbedError, match="truncate_dim is 4, but the vectors have 3 dimensions"):
        cut(vectors, 4)


def test_equal_vectors_stay_equal_at_any_position() -> None:
    row = np.random.default_rng(0).normal(size=33).astype(np.float32)
    found = cut(np.tile(row, (9000, 1)), 17)
    assert (found == found[0]).all()


def test_more_dimensions_than_the_model_has_are_refused(tiny: Any) -> None:
    require_fitting(tiny("qwen2_vl"), ComparisonOptions(truncate_dim=32))
    with pytest.raises(Gen2EmbedError, match=r"truncate_dim is 33, but vectors of .* have 32 dimensions; pass 32 or"):
        require_fitting(tiny("qwen2_vl"), ComparisonOptions(truncate_dim=33))


def test_stored_vectors_cut_behind_the_calibration_are_what_the_calibrated_folder_gives_when_it_truncates(
    tiny_dir: Any, tmp_path: Path
) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    plain = model.encode_query(TEXTS[:4])
    model.calibrate(TEXTS, TEXTS)
    model.save_pretrained(str(tmp_path / "model"))
    found = cut(read_calibrated(tmp_path / "model").map.apply("query", plain), 8)
    stock = SentenceTransformer(str(tmp_path / "model"), device="cpu", truncate_dim=8)
    np.testing.assert_allclose(found, stock.encode_query(TEXTS[:4], normalize_embeddings=True), atol=1e-5)


def test_encoding_truncates_as_sentence_transformers_does(tiny_dir: Any, tmp_path: Path) -> None:
    """It cuts behind the last module, so rows are shorter than 1 unless they are asked to be normalized again."""
    Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").save_pretrained(str(tmp_path / "model"))
    ours = Gen2Embed(tmp_path / "model", device="cpu", truncate_dim=8)
    stock = SentenceTransformer(str(tmp_path / "model"), device="cpu", truncate_dim=8)
    for options in ({}, {"normalize_embeddings": True}, {"truncate_dim": 5}):
        vectors = [one.encode_document(TEXTS[:3], **options) for one in (ours, stock)]
        np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
        lengths = np.linalg.norm(vectors[0], axis=1)
        assert (np.abs(lengths - 1) < 1e-6).all() if "normalize_embeddings" in options else (lengths < 0.99).all()
    assert vectors[0].shape == (3, 5)
    scores = ours.similarity(*(one.encode_document(TEXTS[:3]) for one in (ours, stock)))
    np.testing.assert_allclose(np.diag(scores), np.ones(3), atol=1e-6)  # cosines, whatever the lengths
