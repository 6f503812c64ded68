"""`gen2embed calibrate`: what is read, what is written, and that labels are not used."""

import json

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.embedder.calibration.fitting import Moments, fit

QUERIES = [f"what is number {number}?" for number in range(80)]
POSITIVES = [f"it is {number % 60}" for number in range(80)]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"anchor": query, "positive": positive} for query, positive in zip(QUERIES, POSITIVES, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def calibrate(model, out, data, *more):
    return cli.main(["calibrate", str(model), str(out), "--data", str(data), *more])


@pytest.mark.parametrize("means", ["shared", "side"])
def test_it_writes_the_map_of_the_distinct_inputs(tiny_dir, tmp_path, pairs, means, capsys):
    out = tmp_path / "out"
    assert calibrate(tiny_dir("qwen2_vl"), out, pairs, "--shrinkage", "0.5", "--means", means) == 0
    printed = capsys.readouterr().out
    assert "queries        80" in printed
    assert "documents      60" in printed
    assert json.loads((out / "calibration.json").read_text()) == {
        "num_queries": 80, "num_documents": 60, "shrinkage": 0.5, "means": means, "data": "pairs.jsonl",
        "order": "model"
    }  # fmt: skip
    plain, model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu"), SentenceTransformer(str(out))
    sums = [Moments(32), Moments(32)]
    sums[0].add(plain.encode_query(QUERIES))
    sums[1].add(plain.encode_document(POSITIVES[:60]))
    found = fit(*sums, shrinkage=0.5, means=means)
    for side, vectors in (("query", plain.encode_query(QUERIES)), ("document", plain.encode_document(QUERIES))):
        want = (vectors - found.means[side]) @ found.whitening.T
        want /= np.linalg.norm(want, axis=1, keepdims=True)
        assert np.abs(getattr(model, f"encode_{side}")(QUERIES) - want).max() < 1e-4


def test_by_variance_vectors_may_be_cut_in_any_client(tiny_dir, tmp_path, pairs):
    output = tmp_path / "out"
    assert calibrate(tiny_dir("qwen2_vl"), output, pairs, "--order", "variance") == 0
    assert json.loads((output / "calibration.json").read_text())["order"] == "variance"
    texts = [f"a text about {number}" for number in range(50)]
    whole, short = (SentenceTransformer(str(output), truncate_dim=width).encode_query(texts) for width in (None, 8))
    np.testing.assert_allclose(short, whole[:, :8], atol=1e-6)
    np.testing.assert_allclose(Gen2Embed(output, truncate_dim=8).encode_query(texts), short, atol=1e-6)


def test_which_positive_belongs_to_which_query_does_not_matter(tiny_dir, tmp_path, pairs):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    mixed = [
        {"anchor": row["anchor"], "positive": other["positive"]} for row, other in zip(rows, rows[::-1], strict=True)
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    vectors = []
    for name in ("pairs", "mixed"):
        assert calibrate(tiny_dir("qwen2_vl"), tmp_path / name, tmp_path / f"{name}.jsonl") == 0
        vectors.append(Gen2Embed(tmp_path / name, device="cpu").encode_query(QUERIES))
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


def test_a_calibrated_model_is_calibrated_anew(tiny_dir, tmp_path, pairs):
    assert calibrate(tiny_dir("qwen2_vl"), tmp_path / "once", pairs) == 0
    assert calibrate(tmp_path / "once", tmp_path / "twice", pairs) == 0
    once, twice = (Gen2Embed(tmp_path / name, device="cpu").encode_query(QUERIES) for name in ("once", "twice"))
    assert np.abs(once - twice).max() < 1e-5


def test_the_limit_is_shared_by_the_subsets(tiny_dir, tmp_path, pairs):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.jsonl").write_text(pairs.read_text().replace("number", name))
    assert calibrate(tiny_dir("qwen2_vl"), tmp_path / "out", folder, "--limit", "100") == 0
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert record["num_queries"] == 100
    assert record["num_documents"] == 34  # the first 34, 33 and 33 positives, which are equal in all subsets


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--limit", "40"], "calibration on 80 inputs: their mean would be mostly their content"),
        (["--shrinkage", "0"], "shrinkage is 0.0; pass a number above 0"),
        (["--means", "modality"], "means is 'modality'; known: shared, side"),
        (["--columns", "anchor"], "columns is"),
    ],
)
def test_what_cannot_be_used_is_refused(tiny_dir, pairs, capsys, more, said):
    tmp_path = pairs.parent
    assert calibrate(tiny_dir("qwen2_vl"), tmp_path / "out", pairs, *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_stays_as_it_is(tiny_dir, tmp_path, pairs, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert calibrate(tiny_dir("qwen2_vl"), tmp_path / "out", pairs) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_bad_rows_are_counted_and_end_the_run_if_they_are_many(tiny_dir, tmp_path, pairs, capsys):
    with pairs.open("a") as file:
        file.write('{"anchor": 7\n' * 3)
    assert calibrate(tiny_dir("qwen2_vl"), tmp_path / "out", pairs) == 2
    said = capsys.readouterr().err
    assert "3 of 143 inputs cannot be used; the first: " in said
    assert "pairs.jsonl: line 81: no JSON" in said
    assert not (tmp_path / "out").exists()
    assert calibrate(tiny_dir("qwen2_vl"), tmp_path / "out", pairs, "--max_error_rate", "0.1") == 0


def test_images_are_inputs_too(tiny_dir, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for number in range(60):
        Image.effect_noise((40 + number, 40), 64).convert("RGB").save(images / f"{number}.png")
        rows.append({"query": f"picture {number}", "positive": f"{number}.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--image_dir", str(images), "--image_columns", "positive"]
    assert calibrate(tiny_dir("qwen2_vl"), tmp_path / "out", tmp_path / "pairs.jsonl", *more) == 0
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["num_documents"] == 60


def test_images_are_turned_where_that_is_asked(tiny_dir, tmp_path):
    """Every picture is marked as turned by 90 degrees, so the fitted map differs with the flag, and only then."""
    images = tmp_path / "images"
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = []
    for number in range(60):
        picture = Image.linear_gradient("L").resize((60 + number, 40)).convert("RGB")
        picture.save(images / f"{number}.jpg", exif=exif)
        rows.append({"query": f"picture {number}", "positive": f"{number}.jpg"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--image_dir", str(images), "--image_columns", "positive"]
    vectors = []
    for name, flag in (("plain", []), ("turned", ["--exif_orientation"]), ("again", [])):
        assert calibrate(tiny_dir("qwen2_vl"), tmp_path / name, tmp_path / "pairs.jsonl", *more, *flag) == 0
        vectors.append(Gen2Embed(tmp_path / name, device="cpu").encode_query(["a"]))
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    assert np.abs(vectors[0] - vectors[2]).max() < 1e-6
