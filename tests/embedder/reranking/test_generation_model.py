"""The generative model around an embedder: no weight is copied, and the output layer is the checkpoint's own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from samples import sample_of
from tiny_any import ANY
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.reranking.generation_model import generation_class, generation_model
from gen2embed_mteb.errors import Gen2EmbedError


@pytest.mark.parametrize("family", ["llama", "internvl", "llava_next", "qwen2_vl"])
def test_every_weight_of_the_embedder_is_the_generators_own(tiny, tiny_dir, family):
    embedder = tiny(family)
    model = generation_model(embedder, embedder.source)
    base = getattr(model, model.base_model_prefix)
    assert base is embedder[0].model
    ours = {tensor.data_ptr() for tensor in embedder[0].model.parameters()}
    extra = [name for name, tensor in model.named_parameters() if tensor.data_ptr() not in ours]
    tied = family in ("internvl", "qwen2_vl")
    assert extra == ([] if tied else ["lm_head.weight"])
    assert model.get_output_embeddings().weight.device.type == "cpu"


@pytest.mark.parametrize("family", sample_of([*FAMILIES, *ANY]))
def test_logits_are_those_of_the_checkpoint_loaded_as_a_generator(tiny, tiny_dir, family):
    embedder = tiny(family)
    model = generation_model(embedder, embedder.source)
    task, kind = generation_class(embedder[0].config)
    assert task == ("any-to-any" if embedder.takes_images else "text-generation")
    loaded = kind.from_pretrained(tiny_dir(family), use_safetensors=True).eval()
    ids = torch.tensor([[5, 9, 20, 33, 7]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, loaded(input_ids=ids).logits, atol=1e-5)


def test_a_folder_without_an_output_layer_is_refused(tiny_dir, tmp_path):
    Gen2Embed(tiny_dir("llama"), device="cpu").save_pretrained(str(tmp_path / "export"))
    embedder = Gen2Embed(tmp_path / "export", device="cpu")
    with pytest.raises(Gen2EmbedError, match=r"export: no weight 'lm_head.weight', and the embeddings are not tied.*"):
        _ = embedder.generator


def test_an_export_with_tied_embeddings_is_a_generator(exported):
    embedder = Gen2Embed(exported("internvl"), device="cpu")
    head = embedder.generator.model.get_output_embeddings().weight
    assert head.data_ptr() == embedder[0].model.get_input_embeddings().weight.data_ptr()


def test_an_output_layer_of_another_shape_is_refused(tiny_dir, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_dir("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-8].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    embedder = Gen2Embed(folder, device="cpu")
    with pytest.raises(
        Gen2EmbedError, match=r"model.safetensors: lm_head.weight is \(376, 32\) instead of \(384, 32\)"
    ):
        generation_model(embedder, embedder.source)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_the_output_layer_is_read_under_its_newer_and_its_older_name(tiny_dir, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_dir("llava_next").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    head = weights.pop(next(key for key in weights if key.endswith("lm_head.weight")))
    weights[name] = head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    embedder = Gen2Embed(folder, device="cpu")
    assert torch.equal(generation_model(embedder, embedder.source).lm_head.weight, head)


def test_the_configuration_of_the_embedder_is_left_alone(tiny):
    embedder = tiny("qwen2_vl")
    before = json.dumps(embedder[0].config.to_dict(), default=str)
    generation_model(embedder, embedder.source)
    assert json.dumps(embedder[0].config.to_dict(), default=str) == before


def test_a_model_that_cannot_generate_is_refused():
    with pytest.raises(Gen2EmbedError, match="no generative class for models of type 'clip'"):
        generation_class(transformers.CLIPConfig())
