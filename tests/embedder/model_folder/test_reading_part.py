"""A model that also speaks (Qwen2.5-Omni): its thinker alone is loaded, and the weights of the other parts are not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny_torchvision import write_omni

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.model_folder import checks
from gen2embed_mteb.embedder.model_folder.checked_loading import check_keys, check_size, load_config
from gen2embed_mteb.embedder.model_folder.supported import check_supported, reading_part
from gen2embed_mteb.embedder.model_folder.weight_files import ModelFolderError
from gen2embed_mteb.mteb_plugin.models.model_files import facts_of


@pytest.fixture(scope="module")
def omni_dir(tmp_path_factory):
    return write_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def thinker(omni_dir):
    """The thinker, with the weights that the file has for it, renamed by hand."""
    config = transformers.AutoConfig.from_pretrained(omni_dir).thinker_config
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    places = {"model": "model.language_model", "visual": "model.visual", "audio_tower": "model.audio_tower"}
    weights = {}
    for name, tensor in load_file(omni_dir / "model.safetensors").items():
        part, _, rest = name.removeprefix("thinker.").partition(".")
        if name.startswith("thinker."):
            weights[f"{places.get(part, part)}.{rest}"] = tensor
    model.load_state_dict(weights)
    return model.eval()


def source_of(folder):
    return checks.Source(str(folder), folder, None)


def test_the_configuration_is_the_thinker_s(omni_dir):
    config = load_config(source_of(omni_dir), {})
    assert config.model_type == "qwen2_5_omni_thinker"
    check_supported(config)
    plain = transformers.LlamaConfig()
    assert reading_part(plain) is plain


def test_transformers_loads_the_thinker_s_weights_alone(omni_dir, thinker):
    source = source_of(omni_dir)
    tensors = checks.check(source)
    assert {name.partition(".")[0] for name in tensors} == {"thinker", "talker", "token2wav"}
    config = load_config(source, {})
    check_size(source, config, tensors, trusted=False)
    model, found = transformers.AutoModel.from_pretrained(omni_dir, config=config, output_loading_info=True)
    check_keys(source, model, found)
    expected = thinker.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_talker_s_weights_do_not_stand_for_the_thinker_s(omni_dir, tmp_path):
    folder = shutil.copytree(omni_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["thinker.model.layers.1.mlp.up_proj.weight"]
    tensors["talker.more"] = torch.zeros(10_000)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"the model has \d+ parameters, its weights only \d+"):
        Gen2Embed(folder, device="cpu")


def test_facts_for_mteb_are_the_thinker_s(omni_dir, thinker):
    facts = facts_of(omni_dir)
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in thinker.model.parameters())
    assert facts["num_embedding_parameters"] == thinker.model.language_model.embed_tokens.weight.numel()
    assert (facts["dimensions"], facts["max_tokens"], facts["takes_images"]) == (32, 4096, True)


def test_a_whole_model_embeds_as_its_thinker(omni_dir, thinker, tmp_path, pictures):
    model = Gen2Embed(omni_dir, device="cpu")
    inputs = ["a fox", {"text": "a fox", "image": pictures[0]}]
    found = model.encode_query(inputs)
    for one, vector in zip(inputs, found, strict=True):
        features = model.preprocess([one], task="query")
        features = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        with torch.no_grad():
            state = thinker.model(**features).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(state, dim=0).numpy(), atol=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == "qwen2_5_omni_thinker"
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    messages = [model._content(one).as_messages() for one in inputs]
    np.testing.assert_allclose(plain.encode_query(messages), found, atol=1e-5)


def test_the_thinker_writes_with_its_own_output_layer(omni_dir, thinker):
    generator = Gen2Embed(omni_dir, device="cpu").generator
    assert torch.equal(generator.model.lm_head.weight, thinker.lm_head.weight)
