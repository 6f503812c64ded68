"""Sampling files and the model to be trained: a warning where they differ in name, prompt or readout."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tiny_models import write_tiny

from gen2embed_mteb import Gen2Embed, cli
from trainers.batches.sampled import read_samplings, warn_of_other_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny("qwen2_vl", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sampled(model_dir, tmp_path_factory):
    """What `gen2embed sample` writes with the readout `pre-mlp`."""
    folder = tmp_path_factory.mktemp("sampled")
    rows = "".join(json.dumps({"anchor": f"a {n}", "positive": f"p {n}"}) + "\n" for n in range(8))
    (folder / "pairs.jsonl").write_text(rows)
    words = ["sample", "--data_dir", str(folder / "pairs.jsonl"), "--output_dir", str(folder / "out")]
    words += ["--model_name", str(model_dir), "--num_hard_negatives", "1", "--pool_multiplier", "2"]
    assert cli.main([*words, "--readout", "pre-mlp", "--readout_norm", "false"]) == 0
    return folder / "out"


def warnings(folder: Path, name: str, caplog: pytest.LogCaptureFixture, **options: object) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_other_model(read_samplings(str(folder)), Gen2Embed(name, device="cpu", **options), name)
    return caplog.text


def test_the_same_model_gets_no_warning(sampled, model_dir, caplog):
    assert warnings(sampled, str(model_dir), caplog, readout="pre-mlp", readout_norm=False) == ""
    record = json.loads((sampled / "pairs.json").read_text())
    assert record["model"]["readout"] == "pre-mlp-raw"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "prompt hierarchical and readout last"),
        ({"readout": "pre-mlp"}, "prompt hierarchical and readout pre-mlp;"),
        ({"readout": "pre-mlp", "readout_norm": False, "prompt_mode": "none"}, "prompt none and readout pre-mlp-raw"),
    ],
)
def test_another_readout_or_prompt_is_named(sampled, model_dir, caplog, options, shown):
    text = warnings(sampled, str(model_dir), caplog, **options)
    assert f"sampled by {model_dir} with prompt hierarchical and readout pre-mlp-raw" in text
    assert shown in text


def test_an_earlier_record_names_no_readout(sampled, model_dir, caplog):
    samplings = read_samplings(str(sampled))
    del samplings[0].record["model"]["readout"]
    with caplog.at_level(logging.WARNING):
        warn_of_other_model(samplings, Gen2Embed(model_dir, device="cpu"), str(model_dir))
    assert caplog.text == ""
