"""The generator of a model with a readout: saved as a reranker, and used from several threads at a time."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import sample_of
from sentence_transformers import CrossEncoder

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder

pytestmark = pytest.mark.slow

PAIRS = [("a red circle", "red"), ("x", "blue or not")]
TEXTS = [f"text {number}" for number in range(8)]
READOUTS = [("pre-mlp", True), ("drop-1", True), ("last", False)]


@pytest.fixture(scope="module", params=sample_of(["llama", "qwen2_vl"], ["qwen2_vl"]))
def folder(request: Any, tiny_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose norms are not all ones, so that a lost final norm is seen."""
    made = tmp_path_factory.mktemp("normed") / "model"
    shutil.copytree(tiny_dir(request.param), made)
    tensors = load_file(made / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = tensor + 0.3 * torch.rand_like(tensor)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.mark.parametrize(("readout", "norm"), sample_of(READOUTS, READOUTS[:1]))
def test_its_reranker_is_saved_as_the_generator(folder: Path, tmp_path: Path, readout: str, norm: bool) -> None:
    expected = Gen2Embed(folder, device="cpu").reranker().predict(PAIRS)
    model = Gen2Embed(folder, device="cpu", readout=readout, readout_norm=norm)
    vectors = model.encode_query(TEXTS)
    reranker = model.reranker()
    assert np.abs(reranker.predict(PAIRS) - expected).max() < 1e-6
    ranked = reranker.rank("a", ["b", "c"])
    reranker.save(str(tmp_path / "reranker"))
    assert np.abs(CrossEncoder(str(tmp_path / "reranker"), device="cpu").predict(PAIRS) - expected).max() < 1e-5
    assert "gen2embed" not in json.loads((tmp_path / "reranker" / "config.json").read_text())
    assert np.array_equal(model.encode_query(TEXTS), vectors)
    assert reranker.rank("a", ["b", "c"]) == ranked


@pytest.mark.parametrize(("readout", "norm"), sample_of(READOUTS, READOUTS[:1]))
def test_threads_embed_and_generate_at_the_same_time(folder: Path, readout: str, norm: bool) -> None:
    model = Gen2Embed(folder, device="cpu", readout=readout, readout_norm=norm)
    vectors, written = model.encode_query(TEXTS), model.generator.generate(TEXTS[:4], max_new_tokens=8)
    scores = model.reranker().predict(PAIRS)
    wrong: list[Any] = []

    def generate() -> None:
        for _ in range(5):
            if model.generator.generate(TEXTS[:4], max_new_tokens=8) != written:
                wrong.append("generate")
            if np.abs(model.reranker().rank("x", ["blue or not"])[0]["score"] - scores[1]) > 1e-5:
                wrong.append("rank")

    def embed() -> None:
        for _ in range(10):
            for found in (model.encode_query(TEXTS), PrefixEncoder(model).encode_query([{"text": t} for t in TEXTS])):
                if np.abs(found - vectors).max() > 1e-5:
                    wrong.append("embed")

    def run(part: Any) -> None:
        try:
            part()
        except Exception as error:  # a thread's exception is lost otherwise
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in (generate, embed, embed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_copy_runs_itself_and_keeps_the_signature(folder: Path) -> None:
    model = Gen2Embed(folder, device="cpu", readout="pre-mlp")[0].model
    made = copy.deepcopy(model)
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
    ids = torch.tensor([[1, 2, 3]])
    more = {} if not hasattr(model, "get_rope_index") else {"position_ids": torch.arange(3).expand(3, 1, -1)}
    before = model(input_ids=ids, **more).last_hidden_state
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.zero_()
    assert torch.equal(model(input_ids=ids, **more).last_hidden_state, before)
    assert not torch.equal(made(input_ids=ids, **more).last_hidden_state, before)
