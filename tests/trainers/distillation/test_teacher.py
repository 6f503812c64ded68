"""The teacher's vectors: from both kinds of files, and computed once."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.source import ImageSource
from trainers.distillation import teacher
from trainers.distillation.texts import Texts

TEXTS = Texts(["a", "b", "c"], np.array([[0, 1], [1, 2]]), np.array([0, 1, 5]), 6, [])
"""Three rows of pairs, the second of which cannot be used: a b, -, b c."""
VECTORS = np.arange(1, 25, dtype=np.float16).reshape(6, 4)


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4)])
def test_an_array_has_a_vector_for_each_text_row_after_row(tmp_path, shape):
    np.save(tmp_path / "v.npy", VECTORS.reshape(shape))
    found = teacher.vectors_in_file(tmp_path / "v.npy", TEXTS)
    assert len(found) == 3
    assert found[np.array([2, 0])].tolist() == [[21, 22, 23, 24], [1, 2, 3, 4]]
    assert found[np.array([1])].dtype == np.float32


def test_a_table_has_them_by_text(tmp_path):
    vectors = [[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [4.0, 4.0]]
    pq.write_table(pa.table({"vector": vectors, "text": ["c", "x", "a", "b"]}), tmp_path / "v.parquet")
    found = teacher.vectors_in_file(tmp_path / "v.parquet", TEXTS)
    assert found[np.array([0, 1, 2])].tolist() == [[3, 3], [4, 4], [1, 0]]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("v.npy", lambda path: np.save(path, VECTORS[:5]), r"an array of \(5, 4\), but the data has 3 rows of 2: pass"),
        ("v.npy", lambda path: np.save(path, np.arange(6)), "holds int64, not one array of floats"),
        ("v.npy", lambda path: path.write_bytes(b"no"), "no array"),
        ("v.npy", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "no array"),
        (
            "v.npy",
            lambda path: np.save(path, VECTORS * np.array([[0.0]] + [[1.0]] * 5)),
            "vector of the text 'a' is ze",
        ),
        ("v.npy", lambda path: np.save(path, VECTORS + np.nan), "is zero or not finite"),
        ("v.pt", lambda path: path.write_bytes(b""), r"read from .npy or .parquet; convert the file"),
        ("v.parquet", lambda path: path.write_bytes(b"no"), "cannot be read"),
        ("v.parquet", lambda path: parquet(path, text=["a"], embedding=[[1.0]]), "no column vector; it has text, embe"),
        (
            "v.parquet",
            lambda path: parquet(path, text=["a", "x"], vector=[[1.0], [2.0]]),
            "2 of 3 texts have no vector, the first 'b'; add them",
        ),
        (
            "v.parquet",
            lambda path: parquet(path, text=["a", "b", "c"], vector=[[1.0], [2.0, 3.0], [1.0]]),
            r"the vector of 'b' has \(2,\) numbers, others \(1,\)",
        ),
        ("v.parquet", lambda path: parquet(path, text=["a"], vector=["x"]), "column vector holds string; write lists"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, write, said):
    write(tmp_path / name)
    with pytest.raises(Gen2EmbedError, match=said):
        teacher.vectors_in_file(tmp_path / name, TEXTS)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Gen2EmbedError, match=r"v.npy: cannot be read"):
        teacher.vectors_in_file(tmp_path / "v.npy", TEXTS)


def test_a_models_vectors_are_computed_once(exported, tmp_path, monkeypatch):
    folder, images = exported("qwen2_vl"), ImageSource(tmp_path)
    calls = []
    encode = teacher._Encoder.encode_document
    monkeypatch.setattr(
        teacher._Encoder, "encode_document", lambda self, inputs: calls.append(len(inputs)) or encode(self, inputs)
    )
    found = teacher.vectors_of_model(str(folder), TEXTS, tmp_path / "kept", images, device="cpu")
    plain = SentenceTransformer(str(folder), device="cpu").encode(TEXTS.distinct)
    assert np.abs(found[np.arange(3)] - plain).max() < 1e-5
    assert sum(calls) == 3
    again = teacher.vectors_of_model(str(folder), TEXTS, tmp_path / "kept", images, device="cpu")
    assert sum(calls) == 3
    assert np.array_equal(again[np.arange(3)], found[np.arange(3)])
    with pytest.raises(StoreMismatchError, match=r"prompt is '' there and 'Say: ' now\); pass another --teacher_dir"):
        teacher.vectors_of_model(str(folder), TEXTS, tmp_path / "kept", images, device="cpu", prompt="Say: ")
    other = teacher.vectors_of_model(str(folder), TEXTS, tmp_path / "o", images, device="cpu", prompt="Say: ")
    assert np.abs(other[np.arange(3)] - plain).max() > 1e-3


def test_a_teacher_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "no").mkdir()
    with pytest.raises(Gen2EmbedError, match="cannot be loaded as a SentenceTransformer"):
        teacher.vectors_of_model(str(tmp_path / "no"), TEXTS, tmp_path / "kept", ImageSource(tmp_path), device="cpu")
