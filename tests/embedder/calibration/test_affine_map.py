"""The map of a calibration on stored vectors: they become the calibrated model's own, without its weights."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap, read_calibrated
from gen2embed_mteb.embedder.calibration.fitting import Moments, attach, fit
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.errors import Gen2EmbedError

TEXTS = [f"{color} {shape} number {n}" for n in range(6) for color in ("red", "blue", "green") for shape in "abc"]
INPUTS = [{"text": text} for text in TEXTS]
SIDES = ("query", "document")


@pytest.fixture(scope="module", params=["shared", "side"])
def calibrated(request, tiny_dir, tmp_path_factory):
    """A calibrated folder, and the vectors of the model that it was made of, on both sides."""
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode="hierarchical")
    plain = {side: getattr(PrefixEncoder(model), f"encode_{side}")(INPUTS) for side in SIDES}
    model.calibrate(TEXTS, TEXTS[::-1], means=request.param, data="letters")
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    model.save_pretrained(str(folder))
    return folder, plain


def test_stored_vectors_become_those_of_the_calibrated_model(calibrated):
    folder, plain = calibrated
    found = read_calibrated(folder)
    encoder = PrefixEncoder(Gen2Embed(folder, device="cpu"))
    for side in SIDES:
        mapped = found.map.apply(side, plain[side])
        assert mapped.dtype == np.float32
        assert np.abs(mapped - getattr(encoder, f"encode_{side}")(INPUTS)).max() < 1e-6
        assert np.abs(mapped - plain[side]).max() > 0.01


def test_what_is_read_beside_the_map(calibrated):
    found = read_calibrated(calibrated[0])
    assert found.record.data == "letters"
    assert found.prompt.name == "hierarchical"
    assert found.readout == Readout()
    assert found.map.width == 32
    assert (found.map.biases["query"] == found.map.biases["document"]).all() == (found.record.means == "shared")


def test_the_weights_of_the_model_are_not_needed(calibrated, tmp_path):
    shutil.copytree(calibrated[0], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert read_calibrated(tmp_path / "model").map.digest == read_calibrated(calibrated[0]).map.digest


def test_the_digest_is_of_the_map(calibrated, tmp_path):
    shutil.copytree(calibrated[0], tmp_path / "model")
    path = next((tmp_path / "model").rglob("*Dense/model.safetensors"))
    tensors = load_file(path)
    tensors["linear.bias"][0] += 1
    save_file(tensors, path)
    assert read_calibrated(tmp_path / "model").map.digest != read_calibrated(calibrated[0]).map.digest


@pytest.mark.parametrize("means", ["shared", "side"])
@pytest.mark.parametrize("shrinkage", [0.5, 1.0])
def test_own_map_follows_the_law_on_its_own_inputs(means, shrinkage):
    """W (x - m) has mean zero and the covariance that shrinking leaves; then it is brought to length 1."""
    random = np.random.default_rng(0)
    shape = random.normal(size=(8, 8)) * np.geomspace(1, 0.1, 8)
    sides = {"query": random.normal(size=(90, 8)) @ shape + 2, "document": random.normal(size=(60, 8)) @ shape - 1}
    sides = {
        side: (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for side, rows in sides.items()
    }
    sums = {side: Moments(8) for side in sides}
    for side, rows in sides.items():
        sums[side].add(rows)
    found = AffineMap.fitted(sums["query"], sums["document"], shrinkage=shrinkage, means=means)
    before = {side: rows @ found.weights[side].T + found.biases[side] for side, rows in sides.items()}
    for side, rows in before.items():
        if means == "side":
            assert np.abs(rows.mean(axis=0)).max() < 1e-6
        want = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert np.abs(found.apply(side, sides[side]) - want).max() < 1e-6
    assert np.abs(np.concatenate(list(before.values())).mean(axis=0)).max() < 1e-6
    centred = np.concatenate(
        [
            rows - (rows if means == "side" else np.concatenate(list(sides.values()))).mean(axis=0)
            for rows in sides.values()
        ]
    ).astype(np.float64)
    values, directions = np.linalg.eigh(centred.T @ centred / 150)
    law = (directions * (values / ((1 - shrinkage) * values + shrinkage * values.mean()))) @ directions.T
    every = np.concatenate(list(before.values()))
    np.testing.assert_allclose(every.T @ every / 150, law, atol=1e-5)


def test_inputs_of_one_side_alone_have_one_mean():
    random = np.random.default_rng(0)
    sums = Moments(4)
    sums.add(random.normal(size=(120, 4)))
    found = AffineMap.fitted(sums, Moments(4), shrinkage=1.0, means="side")
    for side in SIDES:
        np.testing.assert_allclose(found.weights[side] @ sums.mean + found.biases[side], 0, atol=1e-12)
    with pytest.raises(Gen2EmbedError, match="calibration on 99 inputs"):
        few = Moments(4)
        few.add(random.normal(size=(99, 4)))
        AffineMap.fitted(few, Moments(4), shrinkage=0.9, means="shared")


def test_equal_vectors_stay_equal_wherever_they_stand():
    random = np.random.default_rng(0)
    weight = random.normal(size=(61, 61))
    found = AffineMap(dict.fromkeys(SIDES, weight), dict.fromkeys(SIDES, random.normal(size=61)))
    rows = random.normal(size=(5000, 61)).astype(np.float32)
    rows[[3, 64, 999, 4097, 4999]] = rows[0]
    mapped = found.apply("query", rows)
    assert (mapped[[3, 64, 999, 4097, 4999]] == mapped[0]).all()
    assert found.apply("query", rows[:0]).shape == (0, 61)
    with pytest.raises(Gen2EmbedError, match="vectors of 61 dimensions, the model's have 7"):
        found.apply("query", rows[:, :7])


def test_a_folder_without_a_calibration_is_refused(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*none.* pass own, or a folder"):
        read_calibrated(tmp_path / "none")
    with pytest.raises(Gen2EmbedError, match=r"has no calibration\.json, so it is not calibrated"):
        read_calibrated(exported("qwen2_vl"))


def test_damaged_folders_are_refused(calibrated, tmp_path):
    def copied(name):
        return shutil.copytree(calibrated[0], tmp_path / name)

    weights = next(copied("weights").rglob("*Dense/model.safetensors"))
    save_file({"linear.weight": load_file(weights)["linear.weight"]}, weights)
    with pytest.raises(Gen2EmbedError, match="is no map of a calibration"):
        read_calibrated(tmp_path / "weights")
    folder = copied("modules")
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(listed[:3]))
    with pytest.raises(
        Gen2EmbedError, match="modules are Transformer, Pooling, Normalize, which end in no calibration"
    ):
        read_calibrated(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(Gen2EmbedError, match="modules are none"):
        read_calibrated(folder)
    folder = copied("code")
    listed[3]["type"] = "os.Dense"
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(Gen2EmbedError, match="is not one that is run here"):
        read_calibrated(folder)


@pytest.mark.parametrize("means", ["shared", "side"])
def test_the_map_of_a_calibration_is_that_of_its_folder(means, tiny_dir, tmp_path):
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    sums = {side: Moments(32) for side in SIDES}
    for number, side in enumerate(SIDES):
        sums[side].add(np.random.default_rng(number).normal(size=(60, 32)) + number)
    fitted = fit(sums["query"], sums["document"], means=means)
    attach(model, fitted)
    model.save_pretrained(str(tmp_path / "model"))
    assert AffineMap.of(fitted).digest == read_calibrated(tmp_path / "model").map.digest
