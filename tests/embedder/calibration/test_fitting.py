"""Calibration: its law on its own sample, sums that add up, and the same vectors by every way of encoding."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.calibration.fitting import CalibrationRecord, Moments, fit
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.errors import Gen2EmbedError

RANDOM = np.random.default_rng(0)
WIDTH = 12
SHAPE = RANDOM.normal(size=(WIDTH, WIDTH)) * np.geomspace(1, 0.05, WIDTH)
QUERIES = RANDOM.normal(size=(400, WIDTH)) @ SHAPE + 2
DOCUMENTS = RANDOM.normal(size=(300, WIDTH)) @ SHAPE - 1
TEXTS = [
    f"{color} {shape} number {n}" for n in range(6) for color in ("red", "blue", "green") for shape in ("a", "b", "c")
]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def moments(*parts):
    sums = Moments(WIDTH)
    for part in parts:
        sums.add(part)
    return sums


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("means", ["shared", "side"])
def test_on_its_own_sample_the_mean_is_zero_and_the_covariance_follows_the_law(shrinkage, means):
    found = fit(moments(QUERIES), moments(DOCUMENTS), shrinkage=shrinkage, means=means)
    sides = {"query": unit(QUERIES), "document": unit(DOCUMENTS)}
    mapped = np.concatenate([(rows - found.means[side]) @ found.whitening.T for side, rows in sides.items()])
    assert np.abs(mapped.mean(axis=0)).max() < 1e-10
    if means == "side":
        assert np.abs(mapped[:400].mean(axis=0)).max() < 1e-10
    centred = np.concatenate([rows - found.means[side] for side, rows in sides.items()])
    values, directions = np.linalg.eigh(centred.T @ centred / 700)
    shrunk = (1 - shrinkage) * values + shrinkage * values.mean()
    np.testing.assert_allclose(mapped.T @ mapped / 700, (directions * (values / shrunk)) @ directions.T, atol=1e-10)


@pytest.mark.parametrize("means", ["shared", "side"])
def test_by_variance_the_first_dimensions_are_the_principal_components(means):
    sums = moments(QUERIES), moments(DOCUMENTS)
    usual, found = (fit(*sums, shrinkage=0.5, means=means, order=order) for order in ("model", "variance"))
    assert found.record.order == "variance"
    sides = {"query": unit(QUERIES), "document": unit(DOCUMENTS)}
    centred = np.concatenate([rows - found.means[side] for side, rows in sides.items()])
    # A singular value decomposition, in place of our eigendecomposition.
    _, values, components = np.linalg.svd(centred, full_matrices=False)
    variances = values**2 / 700
    components = components * np.sign(components[np.arange(WIDTH), np.abs(components).argmax(axis=1)])[:, None]
    mapped = centred @ found.whitening.T
    wanted = centred @ components.T / np.sqrt(0.5 * variances + 0.5 * variances.mean())
    np.testing.assert_allclose(mapped, wanted, atol=1e-8)
    assert (np.diff(mapped.var(axis=0)) < 0).all()
    before = unit(centred @ usual.whitening.T)
    np.testing.assert_allclose(unit(mapped) @ unit(mapped).T, before @ before.T, atol=1e-10)


def test_two_halves_merged_are_the_whole():
    whole, half, other = moments(QUERIES), moments(QUERIES[:123]), moments(QUERIES[123:200], QUERIES[200:])
    half.merge(other)
    assert half.count == whole.count == 400
    np.testing.assert_allclose(half.mean, whole.mean, atol=1e-12)
    np.testing.assert_allclose(half.scatter, whole.scatter, atol=1e-12)


def test_the_length_of_a_vector_does_not_matter():
    np.testing.assert_allclose(moments(QUERIES * 7).scatter, moments(QUERIES).scatter, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_vector_that_is_not_finite_or_zero_is_refused(bad):
    with pytest.raises(Gen2EmbedError, match="not finite, or zero"):
        moments(np.full((1, WIDTH), bad))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_queries": 40, "num_documents": 59}, "calibration on 99 inputs: .*at least 100"),
        ({"num_queries": 0}, "0 queries and 300 documents"),
        ({"shrinkage": 0.0}, r"shrinkage is 0\.0"),
        ({"shrinkage": 1.5}, r"shrinkage is 1\.5"),
        ({"means": "modality"}, "means is 'modality'; known: shared, side"),
        ({"order": "name"}, "order is 'name'; known: model, variance"),
    ],
)
def test_what_cannot_be_used_is_refused(options, said):
    with pytest.raises(Gen2EmbedError, match=said):
        CalibrationRecord(**{"num_queries": 400, "num_documents": 300, "shrinkage": 0.9, "means": "side", **options})


@pytest.fixture(scope="module", params=["shared", "side"])
def calibrated(request, tiny_dir):
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    plain = {side: getattr(model, f"encode_{side}")(TEXTS) for side in ("query", "document")}
    before = fingerprint(model)
    record = model.calibrate([*TEXTS, "x"], [*TEXTS[::2], *TEXTS], shrinkage=0.5, means=request.param, data="letters")
    assert record == CalibrationRecord(55, 81, 0.5, request.param, "letters")
    assert fingerprint(model) != before
    return model, plain


def test_the_map_is_applied_to_the_vectors(calibrated, tiny_dir):
    model, plain = calibrated
    raw = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    sums = [Moments(32), Moments(32)]
    sums[0].add(raw.encode_query([*TEXTS, "x"]))
    sums[1].add(raw.encode_document([*TEXTS[::2], *TEXTS]))
    found = fit(*sums, shrinkage=0.5, means=model.calibration.means)
    for side, vectors in plain.items():
        want = unit((vectors.astype(np.float64) - found.means[side]) @ found.whitening.T)
        assert np.abs(getattr(model, f"encode_{side}")(TEXTS) - want).max() < 1e-5


def test_every_way_of_encoding_has_it(calibrated, tmp_path):
    model, plain = calibrated
    model.save_pretrained(str(tmp_path / "model"))
    stock, again = SentenceTransformer(str(tmp_path / "model")), Gen2Embed(tmp_path / "model", device="cpu")
    encoder = PrefixEncoder(model)
    for side in ("query", "document"):
        want = getattr(model, f"encode_{side}")(TEXTS)
        assert np.abs(want - plain[side]).max() > 0.01
        assert np.abs(np.linalg.norm(want, axis=1) - 1).max() < 1e-6
        assert np.abs(getattr(stock, f"encode_{side}")(TEXTS) - want).max() < 1e-6
        assert np.abs(getattr(again, f"encode_{side}")(TEXTS) - want).max() < 1e-6
        bulk = getattr(encoder, f"encode_{side}")([{"text": text} for text in TEXTS])
        assert np.abs(bulk - want).max() < 1e-5
    assert again.calibration == model.calibration
    assert fingerprint(again) == fingerprint(model)
    assert json.loads((tmp_path / "model" / "calibration.json").read_text())["data"] == "letters"


def test_calibrating_again_replaces_the_map(calibrated, tiny_dir, tmp_path):
    model, _ = calibrated
    model.save_pretrained(str(tmp_path / "model"))
    again = Gen2Embed(tmp_path / "model", device="cpu")
    once = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    for one in (again, once):
        one.calibrate(TEXTS, TEXTS[:50], shrinkage=0.9)
    assert [type(module).__name__ for module in again] == [type(module).__name__ for module in once]
    assert np.abs(again.encode_query(TEXTS) - once.encode_query(TEXTS)).max() < 1e-5
    once.save_pretrained(str(tmp_path / "model"))  # in the place of the other one
    assert (
        np.abs(SentenceTransformer(str(tmp_path / "model")).encode_query(TEXTS) - once.encode_query(TEXTS)).max() < 1e-6
    )
    left = [path for path in (tmp_path / "model").rglob("*Dense*/*") if path.is_file()]
    assert {path.parent.relative_to(tmp_path / "model").as_posix() for path in left} == {"3_Dense"}


def test_too_few_inputs_are_refused_before_any_is_encoded(tiny):
    model = tiny("qwen2_vl")
    with pytest.raises(Gen2EmbedError, match="calibration on 50 inputs"):
        model.calibrate([object()] * 25, [object()] * 25)
    assert model.calibration is None


def test_a_damaged_record_is_an_error(calibrated, tmp_path):
    model, _ = calibrated
    model.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "model" / "calibration.json").write_text('{"shrinkage": 2}')
    with pytest.raises(Gen2EmbedError, match=r"calibration\.json is no record"):
        Gen2Embed(tmp_path / "model")


def test_it_is_fitted_in_full_width_and_then_truncated(tiny_dir):
    whole, cut = (Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", truncate_dim=width) for width in (None, 8))
    for model in (whole, cut):
        model.calibrate(TEXTS, TEXTS)
    assert np.abs(cut.encode_query(TEXTS) - whole.encode_query(TEXTS)[:, :8]).max() < 1e-6


def test_in_half_precision_the_map_stays_in_float32(tiny_dir):
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    model.calibrate([*TEXTS, *TEXTS], TEXTS)
    assert model[3].linear.weight.dtype == torch.float32
    assert np.abs(np.linalg.norm(model.encode_query(TEXTS), axis=1) - 1).max() < 1e-6


def test_with_another_prompt_or_an_adapter_it_is_taken_away_with_a_warning(calibrated, tiny_dir, tmp_path, caplog):
    model, _ = calibrated
    model.save_pretrained(str(tmp_path / "model"))
    other = Gen2Embed(tmp_path / "model", device="cpu", prompt_mode="system")
    assert "is used without calibration" in caplog.text
    assert other.calibration is None
    want = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode="system").encode_query(TEXTS)
    assert np.abs(other.encode_query(TEXTS) - want).max() < 1e-6
    assert Gen2Embed(tmp_path / "model", device="cpu", readout="pre-mlp").calibration is None
    caplog.clear()
    assert Gen2Embed(tmp_path / "model", device="cpu", prompt_mode="hierarchical").calibration == model.calibration
    assert not caplog.records
