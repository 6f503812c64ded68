"""`Gen2Embed.generator` and `Gen2Embed.reranker`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gen2embed_mteb import Gen2Embed


def test_the_generator_is_built_once_and_shares_the_base_model(tiny):
    model = tiny("llama")
    generator = model.generator
    assert model.generator is generator
    assert generator.model.model is model[0].model
    assert "_generator" not in dict(model.named_modules())
    assert model.reranker()[0].model is generator.model


def test_it_is_built_anew_around_another_base_model(tiny_dir):
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    before = model.generator
    model[0].model = Gen2Embed(tiny_dir("llama"), device="cpu")[0].model
    assert model.generator is not before
    assert model.generator.model.model is model[0].model


def test_an_output_layer_of_its_own_follows_the_embedder(tiny_dir):
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    assert model.generator.model.lm_head.weight.dtype == torch.float32
    model.to(torch.bfloat16)
    assert model.generator.model.lm_head.weight.dtype == torch.bfloat16
    assert model.generator.next_token_scores(["a"]).dtype == torch.float32


@pytest.mark.exhaustive
def test_embedding_imports_nothing_of_reranking():
    code = (
        "import sys; from gen2embed_mteb import Gen2Embed; Gen2Embed('gen2embed-mini', device='cpu').encode(['a']); "
        "assert not any(name.startswith('gen2embed_mteb.embedder.reranking') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
